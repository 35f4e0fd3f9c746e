"""The check that every device's update passes before the coordinator uses a number of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedtune.coding import CodecName
from fedtune.errors import ProtocolError, RefusedUpdateError
from fedtune.records import (
    AdapterUpdate,
    DevicePlan,
    Dispatch,
    FloatArray,
    LoraFactors,
    MatrixShape,
    Scale,
)
from fedtune.wire.fields import shown
from fedtune.wire.messages import TrainReport
from fedtune.wire.packing import Packed, PackedTensors, Shape, tensors_digest
from fedtune.wire.tensors import update_from_tensors, update_shapes


def check_update(
    report: TrainReport,
    tensors: Packed,
    *,
    run: str,
    round: int,
    device: str,
    base_digest: str,
    plan: DevicePlan,
    shapes: Mapping[str, MatrixShape],
    dense_shapes: Mapping[str, Shape],
    max_norm: float,
    scale: Scale = 1.0,
    codec: CodecName = "fp32",
    sent: Dispatch | None = None,
    devices: int = 1,
    held_samples: int = 0,
) -> AdapterUpdate:
    """Turn a device's report and bytes into an update that can be joined.

    The update reads its tensors from the bytes when they are asked for, so that those of a fleet
    can lie in files that are mapped in.

    Args:
        report: decoded, so its numbers are in the ranges of the protocol.
        tensors: packed factors and dense parameters; must stay as they are.
        run, round, device, base_digest: what the coordinator asked, and whom.
        plan: what the device was to do.
        shapes: name -> shape of the base's matrices.
        dense_shapes: name -> shape of the parameters that are trained whole.
        max_norm: largest Frobenius norm of one matrix's `scale * b @ a`, and of one dense
            parameter. One device with huge values would otherwise own the weighted mean.
        scale: of the LoRA pairs.
        codec: that the device was to send its tensors in.
        sent: what the device started from, of which any codec but `fp32` holds the change.
        devices: that it stands for at most, if it is their coordinator.
        held_samples: training samples that it said they hold.

    Raises:
        RefusedUpdateError: anything differs; the message says what was expected and found.
    """
    _check_identity(report, run, round, device, base_digest)
    _check_counts(report, plan, devices, held_samples)
    if tensors_digest(tensors) != report.tensors_digest:
        raise RefusedUpdateError(
            f"update of {device}: the tensors do not have the reported sha256; "
            "they were changed or cut on the way"
        )
    try:
        expected = update_shapes(plan, shapes, dense_shapes)
        arrays = PackedTensors(tensors, expected, codec=codec)
        since = None if codec == "fp32" else sent
        factors, dense = update_from_tensors(arrays, plan, scale, since)
        _check_norms(device, factors, dense, max_norm)  # reads every value
    except RefusedUpdateError:
        raise
    except ProtocolError as error:
        raise RefusedUpdateError(f"update of {device}: {error}") from error
    return AdapterUpdate(
        run=run,
        round=round,
        device=device,
        base_digest=base_digest,
        factors=factors,
        dense=dense,
        samples=report.samples,
        tokens=report.tokens,
        metrics=dict(report.metrics),
        devices=report.devices,
        held_samples=report.held_samples,
    )


def _check_identity(
    report: TrainReport, run: str, round: int, device: str, base_digest: str
) -> None:
    pairs = (
        ("run", run, report.run),
        ("round", round, report.round),
        ("device", device, report.device),
        ("base model digest", base_digest, report.base_digest),
    )
    for what, expected, found in pairs:
        if expected != found:
            raise RefusedUpdateError(
                f"update of {device}: expected {what} {expected}, got {shown(str(found), 80)}"
            )


def _check_counts(report: TrainReport, plan: DevicePlan, devices: int, held: int) -> None:
    """Counts weigh an update, so they cannot exceed what the planned steps could consume, and
    what its site said of itself before the first round."""
    most_samples = plan.batch_size * plan.local_steps * devices
    most_tokens = most_samples * plan.sequence_length
    for what, found, least, most in (
        ("devices", report.devices, 1, devices),
        ("held samples", report.held_samples, 0, held),
        ("samples", report.samples, 1, most_samples),
        ("tokens", report.tokens, 1, most_tokens),
    ):
        if not least <= found <= most:
            raise RefusedUpdateError(
                f"update of {report.device}: expected {least}..{most} {what} for its plan, "
                f"got {found}"
            )


def _check_norms(
    device: str,
    factors: Mapping[str, LoraFactors],
    dense: Mapping[str, FloatArray],
    max_norm: float,
) -> None:
    norms = {name: product_norm(pair) for name, pair in factors.items()}
    norms |= {
        name: float(np.linalg.norm(value.astype(np.float64))) for name, value in dense.items()
    }
    for name, norm in norms.items():
        if not norm <= max_norm:
            raise RefusedUpdateError(
                f"update of {device}: expected a norm of at most {max_norm:g} for {name}, "
                f"got {norm:g}"
            )


def product_norm(pair: LoraFactors) -> float:
    """Frobenius norm of `scale * b @ a` without forming it: `sqrt(tr(b^T b a a^T))`.

    Two (rank, rank) products in float64. Cancellation can leave a tiny negative trace, which
    counts as 0.
    """
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    squared = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(pair.scale) * math.sqrt(max(squared, 0.0))
