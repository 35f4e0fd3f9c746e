"""A fleet plan as plain rows, for the ledger, the display and `--json`."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.records import BACKBONE_FORMATS, DevicePlan, DeviceProfile, FleetPlan


def plan_rows(plan: FleetPlan, profiles: Sequence[DeviceProfile]) -> list[dict[str, object]]:
    """One row of JSON values per device, in the plan's order: the `planned` event's devices.

    Raises:
        KeyError: the plan has a device without a profile.
    """
    by_name = {profile.name: profile for profile in profiles}
    return [_row(device, by_name[device.device]) for device in plan.devices]


def _row(plan: DevicePlan, profile: DeviceProfile) -> dict[str, object]:
    ranks = plan.ranks()
    used = {matrix.format for matrix in plan.matrices}
    return {
        "device": plan.device,
        "device_class": profile.device_class,
        "format": "+".join(name for name in BACKBONE_FORMATS if name in used),
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
