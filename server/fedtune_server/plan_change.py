"""What a device is to do otherwise under a new plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtune.plan.describe import plan_rows
from fedtune.records import DevicePlan, DeviceProfile, FleetPlan, ModelShapes

_WORK = (
    "format",
    "bits",
    "rank_min",
    "rank_max",
    "trained_matrices",
    "tail_rank_max",
    "micro_batch",
    "batch_size",
    "sequence_length",
    "local_steps",
    "checkpointing",
)
"""Of a plan's row, what a device does."""
_BY_MATRIX = ("ranks", "forms")
_PREDICTED = ("seconds", "peak_bytes")
_NOT_SAID = ("bits", "batch_size")


@dataclass(frozen=True, slots=True)
class PlanChange:
    """Fields of a plan's row, each with its value in the old and in the new plan.

    Attributes:
        work: what the device does.
        matrices: field -> matrix -> both values, where they differ; None: not in that plan.
        predicted: what the planner expects of it, whether it differs or not.
    """

    work: Mapping[str, list[object]]
    matrices: Mapping[str, Mapping[str, list[object]]] = field(default_factory=dict)
    predicted: Mapping[str, list[object]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the device does anything otherwise."""
        return bool(self.work or self.matrices)

    def words(self) -> str:
        """For a person: `micro_batch 4 -> 2, local_steps 8 -> 5`."""
        said = [
            f"{key} {old} -> {new}" for key, (old, new) in self.work.items() if key not in _NOT_SAID
        ]
        said += [
            f"{key} of {len(of_each)} matrices"
            for key, of_each in self.matrices.items()
            if key == "forms" or "rank_max" not in self.work
        ]
        return ", ".join(said)

    def fields(self) -> dict[str, object]:
        """All of it as JSON values."""
        return {**self.work, **self.matrices, **self.predicted}


def plan_change(
    before: DevicePlan, after: DevicePlan, profile: DeviceProfile, shapes: ModelShapes
) -> PlanChange:
    """Compare a device's old and new plan."""
    old, new = (plan_rows(FleetPlan((p,)), [profile], shapes)[0] for p in (before, after))
    matrices = {key: _differences(old[key], new[key]) for key in _BY_MATRIX}
    return PlanChange(
        work={key: [old[key], new[key]] for key in _WORK if old[key] != new[key]},
        matrices={key: of_each for key, of_each in matrices.items() if of_each},
        predicted={key: [old[key], new[key]] for key in _PREDICTED},
    )


def _differences(old: object, new: object) -> dict[str, list[object]]:
    assert isinstance(old, Mapping)
    assert isinstance(new, Mapping)
    pairs = {name: [old.get(name), new.get(name)] for name in sorted({*old, *new})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
