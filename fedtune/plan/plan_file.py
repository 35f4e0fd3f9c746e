"""A fleet plan as a JSON file that a person can read, compare and edit.

    {"layout": "fedtune-plan-1", "run": "first", "base": {"digest": ..., "headers": ...},
     "classes": {"till": {"format": "nf4/64", "formats": {"model.layers.0.mlp.up_proj": "q8/64"},
                          "rank": 4, "ranks": {"model.layers.3.mlp.up_proj": 7}, "tail": 12,
                          "micro_batch": 4, "batch_size": 8, "sequence_length": 256,
                          "local_steps": 5, "checkpointing": false, "predicted": {...}}},
     "devices": {"Aromi": "till", "Cocum": {"class": "till", "local_steps": 3}}, ...}

A device does what its class's entry says, but for what its own entry says. `format` and `rank` hold
for every matrix that `formats` and `ranks` do not name. A device that `devices` does not name
follows the entry of the class that it reports. `predicted` and `made_with` tell a reader what the
plan was expected to cost and what it was made for; nothing reads them back.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields

from fedtune.plan.describe import form_text
from fedtune.plan.predict import Prediction, predict
from fedtune.plan.settings import PlanSettings
from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    FleetPlan,
    MatrixPlan,
    ModelShapes,
)

LAYOUT = "fedtune-plan-1"
NUMBERS = ("micro_batch", "batch_size", "sequence_length", "local_steps")
"""Keys of an entry that are whole numbers and fields of a `DevicePlan` alike."""

_SCALARS = tuple(f for f in fields(DevicePlan) if f.name not in ("device", "matrices"))
_FIGURES = 6
"""Significant figures of predicted seconds: more would differ between machines."""


def plan_file(
    plan: FleetPlan,
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    run: str,
    calibration: Mapping[str, CostCalibration] | None = None,
    *,
    by_class: bool = False,
) -> dict[str, object]:
    """The plan as JSON values; equal plans give equal values in the same order.

    The entry of a class is the plan that most of its devices have; others say where they differ.

    Args:
        run: name of the run.
        calibration: device class -> what a measured step said of the predictions.
        by_class: leave out the devices, whose names nobody knows yet.

    Raises:
        KeyError: the plan has a device without a profile, or a matrix without a shape.
    """
    by_name = {profile.name: profile for profile in profiles}
    measured = calibration or {}

    def predicted(device: DevicePlan) -> dict[str, object]:
        profile = by_name[device.device]
        cost = predict(device, profile, shapes, settings, measured.get(profile.device_class))
        return _predicted(device, profile, cost)

    of_class: dict[str, list[DevicePlan]] = {}
    for device in plan.devices:
        of_class.setdefault(by_name[device.device].device_class, []).append(device)
    classes: dict[str, object] = {}
    devices: dict[str, object] = {}
    for name, members in sorted(of_class.items()):
        kinds = kinds_of(members)
        most = Counter(kinds).most_common(1)[0][0]  # of equally many, the first
        usual = members[kinds.index(most)]
        classes[name] = _entry(usual) | {"predicted": predicted(usual)}
        for device, kind in zip(members, kinds, strict=True):
            other = _difference(device, usual) if kind != most else {}
            named = {"class": name, **other, "predicted": predicted(device)} if other else name
            devices[device.device] = named
    tree: dict[str, object] = {
        "layout": LAYOUT,
        "run": run,
        "base": {"digest": shapes.digest or None, "headers": shapes.headers or None},
        "made_with": asdict(settings),
        "predicted": _fleet(plan, by_name),
        "classes": classes,
        "devices": {} if by_class else dict(sorted(devices.items())),
    }
    return tree | {"checksum": checksum(tree)}


def plan_text(tree: Mapping[str, object]) -> str:
    """The file's text: one key a line, so that a change of one number is a change of one line."""
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def checksum(tree: Mapping[str, object]) -> str:
    """What `fedtune plan` notes of a file it wrote, to see later whether a person edited it."""
    values = {key: value for key, value in tree.items() if key != "checksum"}
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def kinds_of(plans: Sequence[DevicePlan]) -> list[int]:
    """A number for each plan, from 0: the same for plans that differ in nothing but whose they are.

    Thousands of devices have a few kinds of plans, and most of them the same tuple of matrices,
    which is then compared once.
    """
    tuples: dict[tuple[MatrixPlan, ...], int] = {}
    seen: dict[int, int] = {}  # a tuple in memory -> the number of its content
    kinds: dict[tuple[object, ...], int] = {}
    found = []
    for plan in plans:
        held = id(plan.matrices)
        if held not in seen:
            seen[held] = tuples.setdefault(plan.matrices, len(tuples))
        scalars = tuple(getattr(plan, field.name) for field in _SCALARS)
        found.append(kinds.setdefault((seen[held], *scalars), len(kinds)))
    return found


def fleet_pace(plan: FleetPlan, class_of: Mapping[str, str]) -> tuple[float, tuple[str, ...]]:
    """Seconds of a round with all devices, and the classes of those that it waits for."""
    seconds = max((device.seconds for device in plan.devices), default=0.0)
    slowest = [d.device for d in plan.devices if d.seconds >= seconds * (1 - 1e-9)]
    return seconds, tuple(dict.fromkeys(class_of[name] for name in slowest))


# ---------------------------------------------------------------- entries


def _entry(plan: DevicePlan) -> dict[str, object]:
    """All that a device is told, in the keys of an entry."""
    formats = _compact({m.name: form_text(m.form) for m in plan.matrices})
    ranks = _compact({m.name: m.rank for m in plan.matrices})
    return {
        "format": formats[0],
        "formats": formats[1],
        "rank": ranks[0],
        "ranks": ranks[1],
        "tail": _tail(plan.matrices),
        **{key: getattr(plan, key) for key in NUMBERS},
        "checkpointing": plan.checkpointing,
    }


def _compact(values: Mapping[str, str | int]) -> tuple[str | int, dict[str, str | int]]:
    """The commonest value, and those matrices that have another."""
    usual, _ = Counter(values.values()).most_common(1)[0]
    return usual, {name: value for name, value in values.items() if value != usual}


def _tail(matrices: Iterable[MatrixPlan]) -> int:
    return max((matrix.tail_rank for matrix in matrices), default=0)


def _difference(plan: DevicePlan, usual: DevicePlan) -> dict[str, object]:
    """Keys of an entry that turn the usual plan into this one; empty where they are alike."""
    found: dict[str, object] = {}
    pairs = list(zip(plan.matrices, usual.matrices, strict=True))
    formats = {a.name: form_text(a.form) for a, b in pairs if a.form != b.form}
    ranks = {a.name: a.rank for a, b in pairs if a.rank != b.rank}
    if formats:
        found["formats"] = formats
    if ranks:
        found["ranks"] = ranks
    if _tail(plan.matrices) != _tail(usual.matrices):
        found["tail"] = _tail(plan.matrices)
    for key in (*NUMBERS, "checkpointing"):
        if getattr(plan, key) != getattr(usual, key):
            found[key] = getattr(plan, key)
    return found


# ---------------------------------------------------------------- what a reader is told


def _predicted(plan: DevicePlan, profile: DeviceProfile, cost: Prediction) -> dict[str, object]:
    return {
        "memory_bytes": {**cost.parts, "total": plan.peak_bytes or cost.peak_bytes},
        "budget_bytes": profile.budget_bytes,
        "seconds": _rounded(plan.seconds),
        "compute_seconds": _rounded(cost.compute_seconds),
        "transfer_seconds": _rounded(cost.transfer_seconds),
        "download_bytes": cost.download_bytes,
        "upload_bytes": cost.upload_bytes,
        "trained_matrices": len(plan.ranks()),
        "first_trained_layer": plan.first_trained_layer,
        "limited_by": plan.binding,
    }


def _fleet(plan: FleetPlan, by_name: Mapping[str, DeviceProfile]) -> dict[str, object]:
    class_of = {name: profile.device_class for name, profile in by_name.items()}
    seconds, slowest = fleet_pace(plan, class_of)
    return {
        "round_seconds": _rounded(seconds),
        "paced_by": list(slowest),
        "download_bytes": sum(device.download_bytes for device in plan.devices),
        "upload_bytes": sum(device.upload_bytes for device in plan.devices),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_FIGURES}g}")
