"""Threads are used while they help, and given up when they do not."""

from __future__ import annotations

import pytest
import torch

from fedtune.model import thread_choice
from fedtune.model.thread_choice import ThreadChoice, threads_restored


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(thread_choice, "time", clock)
    return clock


def _run(choice: ThreadChoice, clock: _Clock, seconds: dict[int, float], steps: int) -> list[int]:
    used = []
    for index in range(steps):
        with choice.step(index):
            used.append(torch.get_num_threads())
            clock.now += seconds[torch.get_num_threads()]
    return used


@pytest.fixture
def two_threads() -> object:
    with threads_restored():
        torch.set_num_threads(2)
        yield


@pytest.mark.usefixtures("two_threads")
def test_threads_are_kept_where_they_are_faster(clock: _Clock) -> None:
    used = _run(ThreadChoice(), clock, {1: 1.0, 2: 0.6}, 8)
    assert used == [1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.usefixtures("two_threads")
def test_threads_are_given_up_after_two_slow_steps_in_a_row(clock: _Clock) -> None:
    used = _run(ThreadChoice(), clock, {1: 1.0, 2: 9.0}, 8)
    assert used == [1, 1, 2, 2, 1, 1, 1, 1]


@pytest.mark.usefixtures("two_threads")
def test_one_slow_step_alone_changes_nothing(clock: _Clock) -> None:
    choice = ThreadChoice()
    _run(choice, clock, {1: 1.0, 2: 0.6}, 3)
    for seconds in (5.0, 0.6, 5.0, 0.6):
        with choice.step(9):
            clock.now += seconds
    assert choice.few == 2


def test_one_thread_stays_one(clock: _Clock) -> None:
    with threads_restored():
        torch.set_num_threads(1)
        assert _run(ThreadChoice(), clock, {1: 1.0}, 5) == [1] * 5


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with threads_restored():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before
