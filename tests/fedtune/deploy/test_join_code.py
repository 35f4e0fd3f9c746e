"""Join codes: read as typed, and wrong ones named by group."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.deploy.join_code import JoinCode, parse_join_code
from fedtune.errors import AccessError

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
codes = st.builds(
    JoinCode,
    st.binary(min_size=10, max_size=10),
    st.binary(min_size=15, max_size=15),
)


@given(codes, st.integers(0, 3))
def test_what_is_printed_is_read_back_as_people_type_it(code: JoinCode, form: int) -> None:
    text = str(code)
    assert re.fullmatch(r"FT1(-[0-9A-HJKMNP-TV-Z]{5}){10}", text)
    typed = (text, text.lower(), text.replace("-", " "), text.replace("0", "o").replace("1", "l"))
    assert parse_join_code(typed[form] if form < 3 else text[:4] + typed[3][4:]) == code


@given(codes, st.integers(0, 49), st.sampled_from(ALPHABET))
def test_one_wrong_character_is_found_and_its_group_named(
    code: JoinCode, place: int, other: str
) -> None:
    groups = str(code).split("-")[1:]
    group = groups[place // 5]
    if group[place % 5] == other:
        return
    groups[place // 5] = group[: place % 5] + other + group[place % 5 + 1 :]
    with pytest.raises(AccessError, match=f"^group {place // 5 + 1} of the join code"):
        parse_join_code("-".join(("FT1", *groups)))


@given(codes, st.integers(0, 9), st.integers(0, 3), st.integers(1, 4))
def test_two_swapped_characters_of_a_group_are_found(
    code: JoinCode, place: int, left: int, distance: int
) -> None:
    groups = str(code).split("-")[1:]
    right = min(left + distance, 4)
    letters = list(groups[place])
    if letters[left] == letters[right]:
        return
    letters[left], letters[right] = letters[right], letters[left]
    groups[place] = "".join(letters)
    with pytest.raises(AccessError, match=f"^group {place + 1} of the join code"):
        parse_join_code("-".join(("FT1", *groups)))


@given(codes, st.integers(0, 9), st.integers(0, 9))
def test_two_swapped_groups_are_found(code: JoinCode, left: int, right: int) -> None:
    groups = str(code).split("-")[1:]
    if left == right or groups[left] == groups[right]:
        return
    groups[left], groups[right] = groups[right], groups[left]
    with pytest.raises(AccessError, match=r"^group"):
        parse_join_code("-".join(("FT1", *groups)))


@given(st.text(max_size=80))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(AccessError) as refusal:
        parse_join_code(text)
    assert "\n" not in str(refusal.value)


def test_a_lost_character_and_another_version_are_named() -> None:
    text = str(JoinCode(bytes(10), bytes(15)))
    with pytest.raises(AccessError, match=r"found 49 characters where 50 belong"):
        parse_join_code(text[:-1])
    with pytest.raises(AccessError, match=r"starts with FT1-; found 'FT2-00000-00'"):
        parse_join_code(text.replace("FT1", "FT2"))


def test_a_secret_is_not_shown_by_accident() -> None:
    code = JoinCode(b"0123456789", bytes(15))
    assert "0123456789" not in repr(code)
    assert str(code) not in repr([code])
