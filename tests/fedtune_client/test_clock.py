"""Seconds of a step, from the times at which steps ended."""

from __future__ import annotations

import pytest

from fedtune_client.clock import StepClock


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], 0.0),
        ([5.0], 5.0),  # a single step is all there is
        ([5.0, 6.0], 1.0),
        ([5.0, 6.0, 8.0, 9.5], 1.5),
    ],
)
def test_the_first_of_several_steps_does_not_count(
    monkeypatch: pytest.MonkeyPatch, ends: list[float], expected: float
) -> None:
    times = iter([100.0, *(100.0 + end for end in ends)])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = StepClock()
    for index in range(len(ends)):
        clock(index, 1.0)
    assert clock.step_seconds == pytest.approx(expected)
