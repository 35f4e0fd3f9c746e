"""Before the fleet is planned: which weights matter, and what a step costs, asked of the devices.

Each device measures on a first plan, which is made with the prior and so fits its memory. What it
sends are sums; added, they are those of the joined samples. A device that fails, or whose answer
does not pass the checks, is left out with its reason; if none is left, the prior stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from fedtune.errors import ProtocolError, RefusedUpdateError
from fedtune.importance.gains import measured_report, random_report
from fedtune.records import (
    DevicePlan,
    Event,
    FloatArray,
    ImportanceReport,
    ModelShapes,
)
from fedtune.settings import ImportanceSection
from fedtune.wire.calibration import (
    MEASURED_METHODS,
    CalibrationInstruction,
    CalibrationReport,
    MeasuredMethod,
    calibration_shapes,
    check_calibration,
    decode_calibration_report,
    encode_calibration_instruction,
)
from fedtune.wire.flower import CALIBRATE, to_record
from fedtune.wire.importance import importance_json, read_importance
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune_server.exchange import Answer
from fedtune_server.fleet import Emit, Fleet
from fedtune_server.presence import Again
from fedtune_server.questions import ask
from fedtune_server.run_folder import RunFolder

_LARGEST = 100.0
"""How many times the median device's sums may be a device's own, by their norm per unit of loss.
Chosen: honest devices' gradients differ by their data and by how few samples they have, and that
is less than ten times."""
_NAMED = 5
"""Matrices that an event names."""
_MAJORITY = 3
"""Devices from which on a median says something of the others."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What one optimiser step under a device's first plan took there.

    Attributes:
        plan: the one that was measured.
        peak_bytes: 0: not measured.
    """

    plan: DevicePlan
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the fleet measured.

    Attributes:
        importance: None: the planner's prior.
        steps: device -> its step, of those that measured one.
    """

    importance: ImportanceReport | None = None
    steps: Mapping[str, MeasuredStep] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CalibrationTerms:
    """What the measurement of a run rests on.

    Attributes:
        rank: directions of a matrix that a plan may train.
        method: None: only what a step costs.
        heads: values of the parameters that are trained whole.
    """

    run: str
    shapes: ModelShapes
    rank: int
    batches: int
    seed: int
    deadline_s: float
    method: MeasuredMethod | None = None
    heads: Mapping[str, FloatArray] = field(default_factory=dict)


def find_calibration(
    settings: ImportanceSection,
    terms: CalibrationTerms,
    ask: Callable[[CalibrationTerms], Calibration],
    times_steps: bool,
    folder: RunFolder,
    emit: Emit,
) -> Calibration:
    """The importance that the run file names, and what steps cost where clocks are real.

    The run folder then holds the report. Without one, the planner's prior stands.

    Args:
        terms: of a measurement; `method` is set here.
        ask: lets the devices measure.
        times_steps: whether the devices' clocks are real.

    Raises:
        ProtocolError: `importance.file` cannot be read, is no report, or is of another base.
    """
    report, source = None, ""
    if settings.file:
        report, source = read_importance(Path(settings.file), terms.shapes.digest), settings.file
    elif settings.method == "random":
        report, source = random_report(terms.shapes.matrices, terms.rank, terms.seed), "drawn"
    names = MEASURED_METHODS if not settings.file else ()
    method = next((name for name in names if name == settings.method), None)
    found = Calibration(report)
    if method is not None or times_steps:
        asked = ask(replace(terms, method=method))
        found = asked if method is not None else replace(asked, importance=report)
    if found.importance is None:
        if method is not None:
            text = f"no device could measure {method}; the fleet is planned as with uniform"
            emit(Event("warning", {"text": text}))
        return found
    emit(_found(found.importance, source or "measured"))
    folder.write_json("importance.json", importance_json(found.importance, terms.shapes.digest))
    return found


def calibrate(
    grid: Grid,
    fleet: Fleet,
    plans: Sequence[DevicePlan],
    terms: CalibrationTerms,
    emit: Emit,
    again: Again | None = None,
) -> Calibration:
    """Let the devices of these plans measure; what cannot be used is left out with its reason.

    Args:
        again: how devices that come and go are asked again; default: they stay.
    """
    started = time.perf_counter()
    packed = pack_tensors({f"dense.{name}": value for name, value in terms.heads.items()}, "fp32")
    orders = {plan.device: _order(plan, terms, packed, fleet.labels) for plan in plans}
    emit(Event("leaves_device", {"stage": "calibration", "tensors": _leaving(terms)}))
    contents = {
        device: to_record(CALIBRATE, encode_calibration_instruction(order), packed)
        for device, order in orders.items()
    }
    reports: dict[str, CalibrationReport] = {}
    sums: dict[str, Mapping[str, FloatArray]] = {}
    for answer in ask(
        grid,
        contents,
        fleet.nodes,
        kind=CALIBRATE,
        group="calibration",
        deadline_s=terms.deadline_s,
        again=again,
    ):
        try:
            report, found = _accept(answer, orders[answer.device], terms)
        except ProtocolError as error:
            _refuse(answer.device, str(error), emit)
            continue
        reports[answer.device], sums[answer.device] = report, found
        emit(_measured(report, len(answer.tensors or b"")))
    for device, reason in _outliers(reports, sums).items():
        _refuse(device, reason, emit)
        del reports[device], sums[device]
    reports = dict(sorted(reports.items()))
    emit(
        Event(
            "calibration_finished",
            {
                "devices": len(reports),
                "refused": len(plans) - len(reports),
                "seconds": time.perf_counter() - started,
            },
        )
    )
    steps = {
        device: MeasuredStep(orders[device].plan, report.step_seconds, report.step_peak_bytes)
        for device, report in reports.items()
        if report.step_seconds > 0
    }
    return Calibration(_joined(reports, sums, terms), steps)


def _found(report: ImportanceReport, source: str) -> Event:
    """Which importance the plan is made from, with the matrices that gain most."""
    totals = {name: sum(gains) for name, gains in report.gain_per_rank.items()}
    whole = sum(totals.values())
    top = sorted(totals, key=lambda name: (-totals[name], name))[:_NAMED]
    fields = {
        "method": report.method,
        "source": source,
        "tokens": report.tokens,
        "top": {name: round(totals[name] / whole, 4) for name in top},
    }
    return Event("importance_found", fields)


def _leaving(terms: CalibrationTerms) -> list[dict[str, object]]:
    """Every tensor that a device sends back from its measurement."""
    shapes = calibration_shapes(terms.method, terms.rank, terms.shapes.matrices)
    return [
        {"name": name, "shape": list(shape), "bytes": 4 * int(np.prod(shape))}
        for name, shape in sorted(shapes.items())
    ]


# ---------------------------------------------------------------- one device


def _order(
    plan: DevicePlan, terms: CalibrationTerms, packed: bytes, labels: tuple[str, ...]
) -> CalibrationInstruction:
    return CalibrationInstruction(
        run=terms.run,
        base_digest=terms.shapes.digest,
        plan=plan,
        method=terms.method,
        rank=terms.rank,
        batches=terms.batches,
        seed=terms.seed,
        tensors_digest=tensors_digest(packed),
        labels=labels,
    )


def _accept(
    answer: Answer, order: CalibrationInstruction, terms: CalibrationTerms
) -> tuple[CalibrationReport, Mapping[str, FloatArray]]:
    if answer.failure:
        raise RefusedUpdateError(answer.failure)
    if answer.tensors is None:
        raise RefusedUpdateError("the measurement came without tensors")
    report = decode_calibration_report(answer.body)
    return report, check_calibration(report, answer.tensors, order, terms.shapes.matrices)


def _refuse(device: str, reason: str, emit: Emit) -> None:
    emit(Event("calibration_refused", {"device": device, "reason": reason}))


def _outliers(
    reports: Mapping[str, CalibrationReport], sums: Mapping[str, Mapping[str, FloatArray]]
) -> dict[str, str]:
    """Devices whose sums would drown those of the others, and why they are left out."""
    norms = {
        device: _norm(sums[device]) / max(1, report.units) for device, report in reports.items()
    }
    if len(norms) < _MAJORITY:
        return {}
    median = float(np.median(list(norms.values())))
    return {
        device: f"expected sums of a norm up to {_LARGEST * median:.3g} per unit of loss, "
        f"{_LARGEST:g} times the fleet's median, got {norm:.3g}"
        for device, norm in sorted(norms.items())
        if norm > _LARGEST * median
    }


def _norm(tensors: Mapping[str, FloatArray]) -> float:
    return float(np.sqrt(sum(float(np.vdot(v, v)) for v in map(_wide, tensors.values()))))


def _wide(value: FloatArray) -> FloatArray:
    return value.astype(np.float64)


# ---------------------------------------------------------------- the fleet


def _joined(
    reports: Mapping[str, CalibrationReport],
    sums: Mapping[str, Mapping[str, FloatArray]],
    terms: CalibrationTerms,
) -> ImportanceReport | None:
    """The report of all devices' sums, added in the order of their names."""
    if terms.method is None or not reports:
        return None
    total: dict[str, FloatArray] = {}
    for device in reports:
        for name, value in sums[device].items():
            total[name] = total[name] + value if name in total else _wide(value)
    return measured_report(
        terms.method,
        total,
        terms.shapes.matrices,
        terms.rank,
        terms.seed,
        tokens=sum(report.tokens for report in reports.values()),
        passes=sum(report.passes for report in reports.values()),
    )


def _measured(report: CalibrationReport, upload_bytes: int) -> Event:
    return Event(
        "device_calibrated",
        {
            "device": report.device,
            "samples": report.samples,
            "tokens": report.tokens,
            "upload_bytes": upload_bytes,
            "seconds": report.seconds,
            "step_seconds": report.step_seconds or None,
            "step_peak_bytes": report.step_peak_bytes or None,
        },
    )
