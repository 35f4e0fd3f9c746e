"""A fleet plan as plain rows, for the ledger, the display and `--json`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedtune.plan.cost import CORRECTION_ITEMSIZE, correction_elements, form_bytes
from fedtune.records import (
    BACKBONE_FORMATS,
    DevicePlan,
    DeviceProfile,
    FleetPlan,
    FormatName,
    MatrixForm,
    ModelShapes,
)


def plan_rows(
    plan: FleetPlan, profiles: Sequence[DeviceProfile], shapes: ModelShapes
) -> list[dict[str, object]]:
    """One row of JSON values per device, in the plan's order: the `planned` event's devices.

    Raises:
        KeyError: the plan has a device without a profile, or a matrix without a shape.
    """
    by_name = {profile.name: profile for profile in profiles}
    return [_row(device, by_name[device.device], shapes) for device in plan.devices]


def form_text(form: MatrixForm) -> str:
    """A form in a few characters: `q3/64+8` is q3 in blocks of 64 with a pair of rank 8."""
    block = f"/{form.block_size}" if form.block_size else ""
    return f"{form.format}{block}" + (f"+{form.correction_rank}" if form.correction_rank else "")


def format_text(formats: Collection[FormatName], bits: float) -> str:
    """The backbone of a device in words: `nf4`, or `q2-q4 mixed, 2.9 bits`."""
    used = [name for name in BACKBONE_FORMATS if name in formats]
    if len(used) < 2:
        return "".join(used)
    return f"{used[-1]}-{used[0]} mixed, {bits:.1f} bits"


def mean_bits(plan: DevicePlan, shapes: ModelShapes) -> float:
    """Bits per weight of a device's matrices, with their scales and correction pairs."""
    by_name = shapes.by_name()
    held = [(by_name[matrix.name], matrix.form) for matrix in plan.matrices]
    pair = CORRECTION_ITEMSIZE
    total = sum(form_bytes(*each) + pair * correction_elements(*each) for each in held)
    return 8 * total / sum(matrix.parameters for matrix, _ in held)


def _row(plan: DevicePlan, profile: DeviceProfile, shapes: ModelShapes) -> dict[str, object]:
    ranks, bits = plan.ranks(), mean_bits(plan, shapes)
    return {
        "device": plan.device,
        "device_class": profile.device_class,
        "format": format_text({matrix.format for matrix in plan.matrices}, bits),
        "bits": round(bits, 3),
        "forms": {matrix.name: form_text(matrix.form) for matrix in plan.matrices},
        "ranks": ranks,
        "rank_min": min(ranks.values(), default=0),
        "rank_max": max(ranks.values(), default=0),
        "trained_matrices": len(ranks),
        "tail_rank_max": max((matrix.tail_rank for matrix in plan.matrices), default=0),
        "local_steps": plan.local_steps,
        "micro_batch": plan.micro_batch,
        "batch_size": plan.batch_size,
        "sequence_length": plan.sequence_length,
        "checkpointing": plan.checkpointing,
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": profile.budget_bytes,
        "seconds": plan.seconds,
        "download_bytes": plan.download_bytes,
        "upload_bytes": plan.upload_bytes,
        "binding": plan.binding,
    }
