"""Whose turn it is: seeded, fair, and no more often than a device may."""

from __future__ import annotations

from collections import Counter

import pytest

from fedtune_server.fleet import choose_devices
from fedtune_server.sampling import Draw
from fedtune_server.state import Turns, with_turns

NAMES = tuple("abcdefg")


def play(rounds: int, count: int, seed: int = 0, **fields: object) -> list[tuple[str, ...]]:
    turns: dict[str, Turns] = {}
    chosen = []
    for round in range(1, rounds + 1):
        draw = Draw(count, seed, turns=turns, **fields)  # type: ignore[arg-type]
        chosen.append(draw.choose(NAMES, round))
        turns = with_turns(turns, chosen[-1], round)
    return chosen


@pytest.mark.parametrize("sampling", ["fair", "uniform"])
@pytest.mark.parametrize("count", [0, 7, 9])
def test_all_take_part_where_nothing_limits_them(sampling: str, count: int) -> None:
    assert play(3, count, sampling=sampling) == [NAMES] * 3


def test_equal_seeds_and_histories_give_equal_devices_in_any_order_of_names() -> None:
    assert play(5, 3) == play(5, 3)
    assert len({tuple(play(5, 3, seed)) for seed in range(20)}) > 10
    draw = Draw(3, 4, turns={"a": Turns(1, 1)})
    assert draw.choose(NAMES, 2) == draw.choose(NAMES[::-1], 2)


@pytest.mark.parametrize("seed", range(5))
def test_who_was_left_out_longest_goes_first(seed: int) -> None:
    chosen = play(14, 2, seed)
    taken = Counter(name for names in chosen for name in names)
    assert max(taken.values()) - min(taken.values()) <= 1
    for start in range(len(chosen) - 4):  # any four rounds have eight places, so all take part
        assert {name for names in chosen[start : start + 4] for name in names} == set(NAMES)


def test_the_seed_decides_among_equals() -> None:
    firsts = Counter(name for seed in range(700) for name in play(1, 2, seed)[0])
    assert set(firsts) == set(NAMES)
    assert max(firsts.values()) < 1.4 * min(firsts.values())  # 200 each, +- 12


def test_a_uniform_draw_is_that_of_earlier_releases() -> None:
    chosen = play(4, 3, 8, sampling="uniform")
    assert chosen == [choose_devices(NAMES, 3, 8, round) for round in (1, 2, 3, 4)]


def test_another_attempt_draws_anew() -> None:
    for sampling in ("fair", "uniform"):
        draw = Draw(3, 1, sampling)  # type: ignore[arg-type]
        assert len({draw.choose(NAMES, 1, attempt) for attempt in range(10)}) > 3


def test_those_that_failed_go_last() -> None:
    draw = Draw(3, 0, turns={"c": Turns(5, 9)})
    assert set(draw.choose(NAMES, 10, 1, last=set("abdef"))) > {"c", "g"}
    assert draw.choose("ab", 10, 1, count=2, last={"a"}) == ("a", "b")
    assert draw.choose("abc", 10, 1, count=2, last={"a"}) == ("b", "c")


def test_a_device_takes_part_no_more_often_than_it_may() -> None:
    chosen = play(6, 0, caps={"a": 2, "b": 0, "c": 4})
    assert [("a" in names, "b" in names, "c" in names) for names in chosen] == [
        (round < 2, True, round < 4) for round in range(6)
    ]
    assert Draw(2, 0, turns={"a": Turns(1, 1)}, caps={"a": 1}).choose("ab", 2) == ("b",)
