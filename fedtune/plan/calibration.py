"""From the steps that devices measured to what a class of devices costs beside the closed form.

A device says what a step took and how much memory it held. Both come from a device and may be
anything: a number that no step can have is not used, the median over a class's devices outvotes a
few that lie, and a factor stays within bounds in which the closed form is worth correcting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from fedtune.records import CostCalibration

MOST_SECONDS_FACTOR = 20.0
"""And one over it: a simulated profile may be that far from the machine that plays it. Chosen."""
MOST_BYTES_FACTOR = 1.5
"""Of measured bytes: the closed form is within a tenth (`benchmarks/plan_accuracy.py`), and what a
device keeps of freed memory within half as much again (`fedtune.train.allocator`)."""
LEAST_BYTES_FACTOR = 1.0
"""A lower peak than predicted frees nothing: the measured samples may have been short ones."""
ABSURD = 1000.0
"""Times the prediction, or its thousandth: no measurement at all, and not used."""


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """One device's step under its plan, beside what was predicted of it.

    Attributes:
        seconds: measured; 0: not measured.
        peak_bytes: measured beyond the idle process; 0: not measured.
        predicted_seconds: by `step_seconds`, without calibration.
        predicted_bytes: `PeakBytes.total`, without calibration.
    """

    seconds: float
    predicted_seconds: float
    peak_bytes: float = 0.0
    predicted_bytes: float = 0.0


def calibrate(
    measured: Mapping[str, Iterable[StepMeasurement]], block_seconds: float = 0.0
) -> dict[str, CostCalibration]:
    """Factors per device class: the median over its devices, within bounds.

    Args:
        measured: device class -> its devices' steps.
        block_seconds: what `predicted_seconds` counted for each block's pass; handed on.

    Returns:
        Device class -> calibration; classes without a usable measurement are left out.
    """
    found = {}
    for device_class, steps in measured.items():
        steps = tuple(steps)
        seconds = _ratio((s.seconds, s.predicted_seconds) for s in steps)
        peak = _ratio((s.peak_bytes, s.predicted_bytes) for s in steps)
        if seconds is None and peak is None:
            continue
        found[device_class] = CostCalibration(
            seconds_factor=_within(seconds, 1 / MOST_SECONDS_FACTOR, MOST_SECONDS_FACTOR),
            bytes_factor=_within(peak, LEAST_BYTES_FACTOR, MOST_BYTES_FACTOR),
            block_seconds=block_seconds,
        )
    return found


def _ratio(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Median of measured over predicted, over those that can be; None without any."""
    ratios = [
        measured / predicted
        for measured, predicted in pairs
        if math.isfinite(measured)
        and math.isfinite(predicted)
        and predicted > 0
        and predicted / ABSURD < measured < predicted * ABSURD
    ]
    return median(ratios) if ratios else None


def _within(value: float | None, least: float, most: float) -> float:
    return 1.0 if value is None else min(max(value, least), most)
