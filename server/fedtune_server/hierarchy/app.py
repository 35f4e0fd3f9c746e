"""The Flower ClientApp of a group: the message types of a device, handed to its coordinator."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import ProtocolError
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.messages import (
    decode_evaluate_instruction,
    decode_task_spec,
    decode_train_instruction,
    encode_evaluate_report,
    encode_site_report,
    encode_train_report,
)
from fedtune_server.hierarchy.sub_coordinator import SubCoordinator


def make_group_app(group_of: Callable[[Context], SubCoordinator]) -> ClientApp:
    """Build the app that answers the level above.

    Args:
        group_of: finds the coordinator of the node that a message is for; the same object each
            time, since it keeps the plans of the run.
    """
    app = ClientApp()

    @app.query("profile")  # type: ignore[untyped-decorator]
    def profile(message: Message, context: Context) -> Message:
        body, _ = from_record(message.content, PROFILE)
        report = group_of(context).describe(decode_task_spec(body))
        return Message(to_record(PROFILE, encode_site_report(report)), reply_to=message)

    @app.query("calibration")  # type: ignore[untyped-decorator]
    def calibration(message: Message, context: Context) -> Message:
        raise ProtocolError(
            f"a group does not measure ({CALIBRATE}); let devices of the level above do it, or "
            "name a report that a run below has left (importance.file)"
        )

    @app.train("lora")  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        body, packed = _with_tensors(message.content, TRAIN)
        report, tensors = group_of(context).train(decode_train_instruction(body), packed)
        return Message(to_record(TRAIN, encode_train_report(report), tensors), reply_to=message)

    @app.evaluate("loss")  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        body, packed = _with_tensors(message.content, EVALUATE)
        report = group_of(context).evaluate(decode_evaluate_instruction(body), packed)
        return Message(to_record(EVALUATE, encode_evaluate_report(report)), reply_to=message)

    return app


def _with_tensors(content: RecordDict, kind: str) -> tuple[bytes, bytes]:
    body, packed = from_record(content, kind)
    if packed is None:
        raise ProtocolError(f"message {kind}: expected tensors beside it, found none")
    return body, packed
