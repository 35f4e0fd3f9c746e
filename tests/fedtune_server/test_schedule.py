"""The learning rate over a run: where it starts, where it ends, and that it only falls."""

from __future__ import annotations

import pytest

from fedtune_server.schedule import learning_rate

STEPS = [i / 20 for i in range(21)]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_falling_rate_goes_from_the_peak_to_its_share(shape: str) -> None:
    rates = [learning_rate(0.4, 0.25, progress, shape) for progress in STEPS]
    assert rates[0] == pytest.approx(0.4)
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert rates[10] == pytest.approx(0.25)  # both are half way down in the middle


def test_a_constant_rate_stays() -> None:
    assert {learning_rate(0.4, 0.25, progress, "constant") for progress in STEPS} == {0.4}


def test_a_line_falls_evenly_and_a_cosine_slowly_at_its_ends() -> None:
    line = [learning_rate(1.0, 0.0, progress, "linear") for progress in STEPS]
    wave = [learning_rate(1.0, 0.0, progress, "cosine") for progress in STEPS]
    assert line == pytest.approx([1 - progress for progress in STEPS])
    assert all(w > li for w, li in zip(wave[1:10], line[1:10], strict=True))
    assert all(w < li for w, li in zip(wave[11:20], line[11:20], strict=True))


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_a_share_of_1_keeps_the_peak(shape: str) -> None:
    assert learning_rate(0.3, 1.0, 0.7, shape) == pytest.approx(0.3)
