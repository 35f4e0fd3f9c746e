"""The Flower ClientApp: four message types, each handed to whoever does a device's work.

This module does not import torch, so that a site without it can say so in its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import ProtocolError
from fedtune.records import SiteReport
from fedtune.wire.calibration import (
    CalibrationInstruction,
    CalibrationReport,
    decode_calibration_instruction,
    encode_calibration_report,
)
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.messages import (
    EvaluateInstruction,
    EvaluateReport,
    TaskSpec,
    TrainInstruction,
    TrainReport,
    decode_evaluate_instruction,
    decode_task_spec,
    decode_train_instruction,
    encode_evaluate_report,
    encode_site_report,
    encode_train_report,
)


class Worker(Protocol):
    """Does what one device is asked; each method returns its answer, with tensors if there are."""

    def describe(self, spec: TaskSpec) -> SiteReport: ...

    def calibrate(
        self, order: CalibrationInstruction, packed: bytes
    ) -> tuple[CalibrationReport, bytes]: ...

    def train(self, order: TrainInstruction, packed: bytes) -> tuple[TrainReport, bytes]: ...

    def evaluate(self, order: EvaluateInstruction, packed: bytes) -> EvaluateReport: ...


WorkerOf = Callable[[Message, Context], Worker]
"""Finds who answers a message."""


def make_answering_app(worker_of: WorkerOf) -> ClientApp:
    """Build the app that answers a coordinator's messages."""
    app = ClientApp()

    @app.query("profile")  # type: ignore[untyped-decorator]
    def profile(message: Message, context: Context) -> Message:
        body, _ = from_record(message.content, PROFILE)
        report = worker_of(message, context).describe(decode_task_spec(body))
        return Message(to_record(PROFILE, encode_site_report(report)), reply_to=message)

    @app.query("calibration")  # type: ignore[untyped-decorator]
    def calibration(message: Message, context: Context) -> Message:
        body, packed = with_tensors(message.content, CALIBRATE)
        order = decode_calibration_instruction(body)
        report, tensors = worker_of(message, context).calibrate(order, packed)
        reply = to_record(CALIBRATE, encode_calibration_report(report), tensors)
        return Message(reply, reply_to=message)

    @app.train("lora")  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        body, packed = with_tensors(message.content, TRAIN)
        order = decode_train_instruction(body)
        report, tensors = worker_of(message, context).train(order, packed)
        return Message(to_record(TRAIN, encode_train_report(report), tensors), reply_to=message)

    @app.evaluate("loss")  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        body, packed = with_tensors(message.content, EVALUATE)
        order = decode_evaluate_instruction(body)
        report = worker_of(message, context).evaluate(order, packed)
        return Message(to_record(EVALUATE, encode_evaluate_report(report)), reply_to=message)

    return app


def with_tensors(content: RecordDict, kind: str) -> tuple[bytes, bytes]:
    """A message's body and the tensors beside it.

    Raises:
        ProtocolError: it is no message of that kind, or comes without tensors.
    """
    body, packed = from_record(content, kind)
    if packed is None:
        raise ProtocolError(f"message {kind}: expected tensors beside it, found none")
    return body, packed
