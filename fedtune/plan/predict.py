"""What a device plan costs, whoever made it: the cost model applied to a finished plan.

The planner weighs many plans and has its own running sums; this reads one plan back. It serves the
tables of `fedtune plan` and the check of an edited plan, and a test holds it equal to what the
planner wrote into its plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from fedtune.plan.cost import (
    PeakBytes,
    download_bytes,
    load_of_plan,
    peak_bytes,
    step_seconds,
    transfer_seconds,
    upload_bytes,
)
from fedtune.plan.settings import PlanSettings
from fedtune.records import CostCalibration, DevicePlan, DeviceProfile, ModelShapes

PARTS = (
    "weights",
    "correction",
    "adapters",
    "optimiser",
    "activations",
    "transient",
    "workspace",
    "other",
)
"""Parts of the peak as a person reads them, in their order."""

_PART_OF: Mapping[str, str] = MappingProxyType(
    {
        "backbone": "weights",
        "other": "weights",
        "adapter": "adapters",
        "optimizer": "optimiser",
    }
)
"""Field of `PeakBytes` -> the part that it counts to, where the names differ."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one device's round is predicted to cost.

    Attributes:
        parts: bytes of the peak, by the names of `PARTS`; parts of no bytes are left out.
        compute_seconds: of all local steps.
        transfer_seconds: of both transfers.
    """

    parts: Mapping[str, int]
    compute_seconds: float
    transfer_seconds: float
    download_bytes: int
    upload_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.transfer_seconds


def predict(
    plan: DevicePlan,
    profile: DeviceProfile,
    shapes: ModelShapes,
    settings: PlanSettings,
    calibration: CostCalibration | None = None,
) -> Prediction:
    """Memory, time and traffic of a plan on a device.

    Args:
        plan: its own predictions are not read.
        calibration: what a measured step of the device's class says of the closed form.

    Raises:
        KeyError: the plan has a matrix that the model does not have.
    """
    measured = calibration or CostCalibration()
    load = load_of_plan(
        plan,
        shapes,
        task=settings.task,
        dense_parameters=settings.dense_parameters,
        eager_attention=settings.eager_attention,
        whole_matrices=profile.accelerator != "cpu",
        itemsize=settings.itemsize(profile),
        keeps_start=settings.keeps_start,
    )
    forms = {matrix.name: matrix.form for matrix in plan.matrices}
    step = measured.seconds_factor * step_seconds(
        profile, shapes, forms, load, plan.batch_size, block_seconds=measured.block_seconds
    )
    return Prediction(
        parts=_scaled(memory_parts(peak_bytes(shapes, forms, load)), measured.bytes_factor),
        compute_seconds=plan.local_steps * step,
        transfer_seconds=transfer_seconds(profile, load, settings.wire),
        download_bytes=download_bytes(load, settings.wire),
        upload_bytes=upload_bytes(load, settings.wire),
    )


def memory_parts(peak: PeakBytes) -> dict[str, int]:
    """The peak by the names of `PARTS`, in their order, without parts of no bytes."""
    found = dict.fromkeys(PARTS, 0)
    for field in fields(peak):
        part = _PART_OF.get(field.name, field.name)
        found[part if part in found else "other"] += int(getattr(peak, field.name))
    return {part: size for part, size in found.items() if size}


def _scaled(parts: Mapping[str, int], factor: float) -> dict[str, int]:
    """The parts by what was measured of their total, which is rounded up as a whole."""
    total = math.ceil(sum(parts.values()) * factor)
    found = {part: math.floor(size * factor) for part, size in parts.items()}
    largest = max(found, key=found.__getitem__)
    return found | {largest: found[largest] + total - sum(found.values())}
