"""What measured steps make of predictions, and what a lying device cannot."""

from __future__ import annotations

import math

import pytest

from fedtune.plan.calibration import (
    MOST_BYTES_FACTOR,
    MOST_SECONDS_FACTOR,
    StepMeasurement,
    calibrate,
)
from fedtune.records import CostCalibration


def step(seconds: float, peak: float = 0.0) -> StepMeasurement:
    return StepMeasurement(seconds, 2.0, peak, 1000.0)


def test_a_class_gets_the_median_of_its_devices_factors() -> None:
    found = calibrate({"lab": [step(3.0, 1100), step(2.0, 1200), step(8.0, 1300)], "pi": []})
    assert found == {"lab": CostCalibration(1.5, 1.2)}


def test_one_device_in_three_cannot_move_its_class() -> None:
    honest = [step(3.0, 1100), step(3.1, 1110)]
    for lie in (step(1e-9, 1), step(1e9, 1e18), step(math.nan, math.inf), step(-1.0, -1.0)):
        found = calibrate({"lab": [*honest, lie]})["lab"]
        assert 1.5 <= found.seconds_factor <= 1.55
        assert 1.1 <= found.bytes_factor <= 1.11


def test_absurd_numbers_alone_give_no_calibration() -> None:
    assert calibrate({"lab": [step(0.0), step(math.nan), step(1e7), step(-2.0)]}) == {}


def test_factors_stay_within_bounds() -> None:
    slow, fast = (calibrate({"lab": [step(s, p)]})["lab"] for s, p in ((500, 1e5), (0.01, 500)))
    assert slow == CostCalibration(MOST_SECONDS_FACTOR, MOST_BYTES_FACTOR)
    assert fast == CostCalibration(1 / MOST_SECONDS_FACTOR, 1.0)


def test_what_was_not_measured_stays_as_predicted() -> None:
    found = calibrate({"a": [step(3.0)], "b": [step(0.0, 1250)]}, block_seconds=1e-3)
    assert found == {
        "a": CostCalibration(1.5, 1.0, 1e-3),
        "b": CostCalibration(1.0, 1.25, 1e-3),
    }


def test_a_calibration_refuses_host_seconds_that_are_none() -> None:
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="block_seconds must not be negative"):
            CostCalibration(block_seconds=value)
