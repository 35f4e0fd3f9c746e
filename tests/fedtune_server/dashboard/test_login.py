"""Tokens, cookies, and how often one may try."""

from __future__ import annotations

import pytest

from fedtune.deploy.homes import CoordinatorHome
from fedtune.errors import DeploymentError
from fedtune_server.dashboard.login import SESSION_S, TOKEN_FILE, Attempts, Doorkeeper, read_tokens

from .conftest import TOKEN


class _Clock:
    time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


def _cookie(door: Doorkeeper, token: str = "good") -> str:
    cookie = door.sign_in(token)
    assert cookie is not None
    return cookie


def test_both_tokens_open_the_door_and_no_other() -> None:
    door = Doorkeeper(lambda: ("good", "own"))
    assert door.knows(_cookie(door, "good"))
    assert door.knows(_cookie(door, "own"))
    for wrong in ("", "goo", "good ", "Good", "é\udc80"):
        assert door.sign_in(wrong) is None
        assert not door.accepts(wrong)


def test_a_session_ends_after_its_time() -> None:
    clock = _Clock()
    door = Doorkeeper(lambda: ("good",), clock)
    cookie = _cookie(door)
    clock.time += SESSION_S - 1
    assert door.knows(cookie)
    clock.time += 2
    assert not door.knows(cookie)


def test_a_session_outlives_a_restart_and_ends_with_a_new_token() -> None:
    tokens = ["good"]
    cookie = _cookie(Doorkeeper(lambda: tuple(tokens)))
    again = Doorkeeper(lambda: tuple(tokens))
    assert again.knows(cookie)
    tokens[0] = "renewed"
    assert not again.knows(cookie)


def test_who_signed_out_stays_out_and_others_stay_in() -> None:
    door = Doorkeeper(lambda: ("good",))
    mine, other = _cookie(door), _cookie(door)
    door.sign_out(mine)
    assert not door.knows(mine)
    assert door.knows(other)


def test_a_changed_cookie_is_not_known() -> None:
    door = Doorkeeper(lambda: ("good",))
    expiry, nonce, mac = _cookie(door).split(".")
    later = str(int(expiry) + 1)
    for forged in (
        "", ".", "..", f"{later}.{nonce}.{mac}", f"{expiry}.{nonce}x.{mac}", f"{expiry}.{nonce}.",
        f"{expiry}.{nonce}.{mac[:-1]}", f"{expiry}..{mac}", f"²{expiry}.{nonce}.{mac}",
        f"{expiry}.{nonce}.é\udc80", "9" * 5000,
    ):  # fmt: skip
        assert not door.knows(forged)


def test_an_address_may_be_wrong_five_times_a_minute() -> None:
    clock = _Clock()
    attempts = Attempts(of_one=5, of_all=100, now=clock)
    for _ in range(5):
        assert attempts.wait_s("a") == 0
        attempts.wrong("a")
        clock.time += 1
    assert attempts.wait_s("a") == pytest.approx(55)
    assert attempts.wait_s("b") == 0
    clock.time += 55
    assert attempts.wait_s("a") == 0


def test_many_addresses_together_are_limited_too_and_few_are_remembered() -> None:
    clock = _Clock()
    attempts = Attempts(of_one=5, of_all=5000, now=clock)
    for index in range(5000):
        attempts.wrong(f"address {index}")
    assert attempts.wait_s("somebody new") > 0
    assert len(attempts._wrong) == 1024


def test_tokens_are_read_from_the_home(home: CoordinatorHome) -> None:
    assert read_tokens(home) == (TOKEN,)
    (home.path / TOKEN_FILE).write_text("own\n", encoding="utf-8")
    assert read_tokens(home) == ("own", TOKEN)
    home.operator_file.unlink()
    assert read_tokens(home) == ("own",)
    (home.path / TOKEN_FILE).write_text("\n", encoding="utf-8")
    with pytest.raises(DeploymentError, match=r"needs a token and found none in .*server init"):
        read_tokens(home)
    home.operator_file.write_text("token = ", encoding="utf-8")
    with pytest.raises(DeploymentError, match=r"operator\.toml cannot be read"):
        read_tokens(home)
