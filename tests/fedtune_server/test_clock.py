"""A real clock that looks more often near the end, and a virtual one that jumps."""

from __future__ import annotations

import time

import pytest

from fedtune_server.clock import LinkClock, RealClock, VirtualClock


def test_virtual_time_stands_still_until_something_is_waited_for() -> None:
    clock = VirtualClock()
    clock.alarm(5.0)
    assert (clock.now(), clock.now(), clock.virtual) == (0.0, 0.0, True)


def test_virtual_time_goes_on_to_the_next_alarm_or_to_the_end() -> None:
    clock = VirtualClock()
    for at in (5.0, 2.0, 2.0, 90.0):
        clock.alarm(at)
    seen = []
    for end in (10.0, 10.0, 10.0, 20.0, 20.0, 1.0):
        clock.wait(0.001, end)
        seen.append(clock.now())
    assert seen == [2.0, 5.0, 10.0, 20.0, 20.0, 20.0]  # it never goes back


def test_an_alarm_that_is_over_holds_nothing_up() -> None:
    clock = VirtualClock()
    clock.wait(1.0, 8.0)
    clock.alarm(3.0)
    clock.wait(1.0, 9.0)
    assert clock.now() == 9.0


def test_a_real_wait_ends_shortly_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    clock = RealClock()
    for end in (200.0, 100.5, 100.01):
        clock.wait(1.0, end)
    assert slept == pytest.approx([1.0, 0.45, 0.002])
    assert not clock.virtual


def test_time_in_which_the_link_was_away_does_not_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    now, away, slept = [100.0], [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    clock = LinkClock(lambda: away[0])
    before = clock.now()
    now[0], away[0] = 125.0, 18.0  # as after a call that waited for 18 s
    assert clock.now() - before == 7.0
    clock.wait(5.0, before + 8.0)
    assert slept == pytest.approx([0.95])
    assert clock.slack_s > RealClock.slack_s == 0.0
