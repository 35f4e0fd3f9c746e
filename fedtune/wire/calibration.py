"""What a coordinator asks of a device before it plans, and the sums that come back.

Everything that travels is a sum over a device's samples: the sums of all devices, added, are those
of their joined samples. The tensors are float32, since they are added and then factorised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from fedtune.errors import ProtocolError, RefusedUpdateError
from fedtune.records import DevicePlan, FloatArray, MatrixShape
from fedtune.v1 import calibration_pb2 as pb
from fedtune.wire import fields
from fedtune.wire.packing import Shape, tensors_digest, unpack_tensors
from fedtune.wire.plans import plan_message, plan_record

MeasuredMethod: TypeAlias = Literal["spectrum", "sensitivity", "activation", "adalora"]
"""The methods of importance that devices measure for."""
MEASURED_METHODS: tuple[MeasuredMethod, ...] = get_args(MeasuredMethod)

OVERSAMPLED = 8
"""Columns of a sketch beyond the rank that is asked for; the usual number (arXiv 0909.4061)."""
_MAX_SEED = 2**64 - 1
_MAX_BYTES = 2**50


@dataclass(frozen=True, slots=True)
class CalibrationInstruction:
    """One device's measurement.

    Attributes:
        plan: gives the backbone, the micro-batch and the batch; a first plan, that fits the device.
        method: None: only what a step costs.
        rank: directions of a matrix that are asked for.
        batches: of `plan.batch_size` samples.
        seed: of the sketches; the same for all devices.
        tensors_digest: hex sha256 of the packed parameters that are trained whole.
        measure_step: time a step under the plan, where the site's clock is real.
    """

    run: str
    base_digest: str
    plan: DevicePlan
    method: MeasuredMethod | None
    rank: int
    batches: int
    seed: int
    tensors_digest: str
    labels: tuple[str, ...] = ()
    measure_step: bool = True


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a device says of its measurement; the sums are beside the message.

    Attributes:
        units: tokens that carried loss, or samples when classifying.
        tokens: that were read.
        passes: forward and backward passes; `sensitivity` and `adalora` add up by pass.
        seconds: that the measurement took.
        step_seconds: of one optimiser step under the plan; 0: not measured.
        step_peak_bytes: most that such a step held beyond the process before it; 0: not measured.
    """

    run: str
    device: str
    base_digest: str
    method: MeasuredMethod | None
    samples: int
    units: int
    tokens: int
    passes: int
    tensors_digest: str
    seconds: float = 0.0
    step_seconds: float = 0.0
    step_peak_bytes: int = 0


def encode_calibration_instruction(order: CalibrationInstruction) -> bytes:
    """The protobuf bytes of a measurement to make."""
    message = pb.CalibrationInstruction(
        run=order.run,
        base_digest=order.base_digest,
        plan=plan_message(order.plan),
        method=order.method or "",
        rank=order.rank,
        batches=order.batches,
        seed=order.seed,
        tensors_digest=order.tensors_digest,
        labels=order.labels,
        measure_step=order.measure_step,
    )
    return message.SerializeToString(deterministic=True)


def decode_calibration_instruction(data: bytes) -> CalibrationInstruction:
    """Read a measurement to make.

    Raises:
        ProtocolError: the bytes are no instruction, or a field is out of its range.
    """
    message = fields.parse(pb.CalibrationInstruction(), data, "CalibrationInstruction")
    return CalibrationInstruction(
        run=fields.text(message.run, "run"),
        base_digest=fields.text(message.base_digest, "base_digest"),
        plan=plan_record(message.plan),
        method=_method(message.method),
        rank=fields.whole(message.rank, "rank", 1, fields.MAX_RANK),
        batches=fields.whole(message.batches, "batches", 1, 2**20),
        seed=fields.whole(message.seed, "seed", 0, _MAX_SEED),
        tensors_digest=fields.text(message.tensors_digest, "tensors_digest"),
        labels=fields.texts(message.labels, "labels"),
        measure_step=message.measure_step,
    )


def encode_calibration_report(report: CalibrationReport) -> bytes:
    """The protobuf bytes of what was measured."""
    message = pb.CalibrationReport(
        run=report.run,
        device=report.device,
        base_digest=report.base_digest,
        method=report.method or "",
        samples=report.samples,
        units=report.units,
        tokens=report.tokens,
        passes=report.passes,
        seconds=report.seconds,
        step_seconds=report.step_seconds,
        step_peak_bytes=report.step_peak_bytes,
        tensors_digest=report.tensors_digest,
    )
    return message.SerializeToString(deterministic=True)


def decode_calibration_report(data: bytes) -> CalibrationReport:
    """Read what was measured.

    Raises:
        ProtocolError: the bytes are no report, or a field is out of its range.
    """
    message = fields.parse(pb.CalibrationReport(), data, "CalibrationReport")
    return CalibrationReport(
        run=fields.text(message.run, "run"),
        device=fields.text(message.device, "device", longest=128),
        base_digest=fields.text(message.base_digest, "base_digest"),
        method=_method(message.method),
        samples=fields.whole(message.samples, "samples", 0, fields.MAX_COUNT),
        units=fields.whole(message.units, "units", 0, fields.MAX_COUNT),
        tokens=fields.whole(message.tokens, "tokens", 0, fields.MAX_COUNT),
        passes=fields.whole(message.passes, "passes", 0, fields.MAX_COUNT),
        seconds=fields.real(message.seconds, "seconds", 0.0, 1e9),
        step_seconds=fields.real(message.step_seconds, "step_seconds", 0.0, 1e9),
        step_peak_bytes=fields.whole(message.step_peak_bytes, "step_peak_bytes", 0, _MAX_BYTES),
        tensors_digest=fields.text(message.tensors_digest, "tensors_digest"),
    )


def _method(name: str) -> MeasuredMethod | None:
    if not name:
        return None
    return cast(MeasuredMethod, fields.one_of(name, "method", MEASURED_METHODS))


# ---------------------------------------------------------------- the sums


def sketch_size(rank: int, out_features: int, in_features: int) -> int:
    """Columns of a matrix's sketch: some more than the rank, and no more than the matrix has."""
    return min(rank + OVERSAMPLED, out_features, in_features)


def left_size(size: int) -> int:
    """Rows of the sketch from the other side, which has to be somewhat larger.

    Source:
        Tropp et al. (arXiv 1609.00048, section 4.5) advise 2 k + 1 for matrices of real numbers.
    """
    return 2 * size + 1


def calibration_shapes(
    method: MeasuredMethod | None, rank: int, matrices: Sequence[MatrixShape]
) -> dict[str, Shape]:
    """Name -> shape of every tensor that a device sends back."""
    shapes: dict[str, Shape] = {}
    for matrix in matrices:
        out, inputs = matrix.out_features, matrix.in_features
        size = sketch_size(rank, out, inputs)
        parts: dict[str, Shape] = {}
        if method == "spectrum":
            parts = {"right": (out, size), "left": (left_size(size), inputs), "weight": (1,)}
        elif method == "activation":
            parts = {"inputs": (inputs, size), "energy": (1,)}
        elif method == "adalora":
            triplets = (min(rank, out, inputs),)
            parts = {"score": triplets, "square": triplets}
        elif method == "sensitivity":
            parts = {"sensitivity": (1,)}
        shapes |= {f"{matrix.name}.{part}": shape for part, shape in parts.items()}
    return shapes


def check_calibration(
    report: CalibrationReport,
    tensors: bytes,
    order: CalibrationInstruction,
    matrices: Sequence[MatrixShape],
) -> Mapping[str, FloatArray]:
    """The sums of a device that did what it was asked to.

    Args:
        report: decoded, so its numbers are in the ranges of the protocol.
        matrices: those that may be trained.

    Raises:
        RefusedUpdateError: anything differs; the message says what was expected and found.
    """
    device = order.plan.device
    pairs = (
        ("run", order.run, report.run),
        ("device", device, report.device),
        ("base model digest", order.base_digest, report.base_digest),
        ("method", str(order.method), str(report.method)),
    )
    for what, expected, found in pairs:
        if expected != found:
            raise RefusedUpdateError(
                f"measurement of {device}: expected {what} {expected}, "
                f"got {fields.shown(found, 80)}"
            )
    _check_counts(report, order)
    if tensors_digest(tensors) != report.tensors_digest:
        raise RefusedUpdateError(
            f"measurement of {device}: the tensors do not have the reported sha256; "
            "they were changed or cut on the way"
        )
    try:
        return unpack_tensors(tensors, calibration_shapes(order.method, order.rank, matrices))
    except ProtocolError as error:
        raise RefusedUpdateError(f"measurement of {device}: {error}") from error


def _check_counts(report: CalibrationReport, order: CalibrationInstruction) -> None:
    """Counts weigh a device's sums in the reader's eyes, so they cannot exceed what was asked."""
    plan = order.plan
    samples = plan.batch_size * order.batches if order.method is not None else 0
    least = 1 if samples else 0
    for what, found, most in (
        ("samples", report.samples, samples),
        ("units", report.units, samples * plan.sequence_length),
        ("tokens", report.tokens, samples * plan.sequence_length),
        ("passes", report.passes, samples),
    ):
        if not least <= found <= most:
            raise RefusedUpdateError(
                f"measurement of {report.device}: expected {least}..{most} {what}, got {found}"
            )
