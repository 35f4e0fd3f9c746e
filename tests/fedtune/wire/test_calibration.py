"""What is asked before a plan, what comes back, and what of it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ProtocolError, RefusedUpdateError
from fedtune.records import DevicePlan, MatrixPlan, MatrixShape
from fedtune.wire.calibration import (
    MEASURED_METHODS,
    CalibrationInstruction,
    CalibrationReport,
    MeasuredMethod,
    calibration_shapes,
    check_calibration,
    decode_calibration_instruction,
    decode_calibration_report,
    encode_calibration_instruction,
    encode_calibration_report,
    left_size,
    sketch_size,
)
from fedtune.wire.packing import pack_tensors, tensors_digest

MATRICES = (MatrixShape("layers.0.up", 40, 30, 0), MatrixShape("layers.0.down", 6, 40, 0))
PLAN = DevicePlan(
    "east", tuple(MatrixPlan(m.name, 2, "q4") for m in MATRICES), 2, 4, 40, 3, peak_bytes=10**6
)
ORDER = CalibrationInstruction("run-1", "d" * 64, PLAN, "spectrum", 4, 3, 7, "s" * 64, ("a", "b"))


def tensors(method: MeasuredMethod | None = "spectrum") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = calibration_shapes(method, ORDER.rank, MATRICES)
    return {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}


def report(packed: bytes, **changes: Any) -> CalibrationReport:
    fields: dict[str, Any] = {
        "run": "run-1",
        "device": "east",
        "base_digest": "d" * 64,
        "method": "spectrum",
        "samples": 12,
        "units": 100,
        "tokens": 300,
        "passes": 6,
        "tensors_digest": tensors_digest(packed),
        "seconds": 1.5,
    }
    return CalibrationReport(**{**fields, **changes})


def checked(packed: bytes, **changes: Any) -> Mapping[str, Any]:
    return check_calibration(report(packed, **changes), packed, ORDER, MATRICES)


def test_an_instruction_and_a_report_come_back_as_they_were() -> None:
    for order in (ORDER, replace(ORDER, method=None, labels=(), measure_step=False)):
        assert decode_calibration_instruction(encode_calibration_instruction(order)) == order
    said = report(b"", step_seconds=0.25, step_peak_bytes=10**9)
    for back in (said, replace(said, method=None)):
        assert decode_calibration_report(encode_calibration_report(back)) == back


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "guess"}, "method: expected one of spectrum"),
        ({"rank": 0}, "rank: expected 1..4096, got 0"),
        ({"batches": 0}, "batches: expected 1.."),
        ({"labels": ("a", "a")}, "labels: 'a' comes twice"),
    ],
)
def test_an_instruction_out_of_its_ranges_is_refused(changes: Any, words: str) -> None:
    data = encode_calibration_instruction(replace(ORDER, **changes))
    with pytest.raises(ProtocolError, match=words):
        decode_calibration_instruction(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step_seconds": float("nan")}, "step_seconds: expected a finite number"),
        ({"step_seconds": -1.0}, "step_seconds: expected 0"),
        ({"step_peak_bytes": 2**60}, "step_peak_bytes: expected 0"),
        ({"seconds": float("inf")}, "seconds: expected a finite number"),
        ({"device": "x" * 200}, "device: expected at most 128 characters"),
        ({"method": "guess"}, "method: expected one of"),
    ],
)
def test_a_report_out_of_its_ranges_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode_calibration_report(encode_calibration_report(report(b"", **changes)))


def test_bytes_that_are_no_message_are_refused() -> None:
    for decode in (decode_calibration_instruction, decode_calibration_report):
        with pytest.raises(ProtocolError, match="are not a Calibration"):
            decode(b"\xff\xff")


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_good_sums_are_taken(method: MeasuredMethod) -> None:
    sent = tensors(method)
    packed = pack_tensors(sent, "fp32")
    order = replace(ORDER, method=method)
    found = check_calibration(report(packed, method=method), packed, order, MATRICES)
    assert found.keys() == sent.keys()
    for name, value in sent.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_measured_step_alone_needs_no_tensors() -> None:
    packed = pack_tensors({}, "fp32")
    nothing = {"samples": 0, "units": 0, "tokens": 0, "passes": 0, "method": None}
    order = replace(ORDER, method=None)
    assert check_calibration(report(packed, **nothing), packed, order, MATRICES) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "other"}, "measurement of east: expected run run-1, got 'other'"),
        ({"device": "west"}, "expected device east, got 'west'"),
        ({"base_digest": "e" * 64}, "expected base model digest dddd"),
        ({"method": "adalora"}, "expected method spectrum, got 'adalora'"),
        ({"samples": 13}, "expected 1..12 samples, got 13"),
        ({"samples": 0}, "expected 1..12 samples, got 0"),
        ({"units": 10**6}, "expected 1..480 units"),
        ({"tokens": 10**6}, "expected 1..480 tokens"),
        ({"passes": 13}, "expected 1..12 passes"),
        ({"tensors_digest": "0" * 64}, "do not have the reported sha256"),
    ],
)
def test_a_report_that_is_not_of_what_was_asked_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(RefusedUpdateError, match=words):
        checked(pack_tensors(tensors(), "fp32"), **changes)


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "nan", "cut"])
def test_tensors_that_are_not_as_asked_are_refused(kind: str) -> None:
    sent = tensors()
    name = "layers.0.up.right"
    words = {
        "missing": f"{name} is missing",
        "extra": "got 'x' besides",
        "shape": rf"tensor {name}: expected shape \(40, 12\), got \(12, 40\)",
        "nan": "expected finite values",
        "cut": "bytes",
    }[kind]
    if kind == "missing":
        del sent[name]
    elif kind == "extra":
        sent["x"] = np.zeros(1, np.float32)
    elif kind == "shape":
        sent[name] = sent[name].T
    packed = pack_tensors(sent, "fp32")
    if kind == "nan":
        packed = packed[:-4] + np.float32(np.nan).tobytes()
    elif kind == "cut":
        packed = packed[:-4]
    with pytest.raises(RefusedUpdateError, match=words):
        checked(packed)


def test_a_sketch_is_no_larger_than_its_matrix() -> None:
    assert sketch_size(4, 40, 30) == 12
    assert sketch_size(16, 6, 40) == 6
    shapes = calibration_shapes("spectrum", 16, MATRICES)
    assert shapes["layers.0.down.right"] == (6, 6)
    assert shapes["layers.0.down.left"] == (left_size(6), 40)
