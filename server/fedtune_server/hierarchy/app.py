"""The Flower ClientApp of a group: the message types of a device, handed to its coordinator."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune_server.hierarchy.answering import answer
from fedtune_server.hierarchy.sub_coordinator import SubCoordinator


def make_group_app(group_of: Callable[[Context], SubCoordinator]) -> ClientApp:
    """Build the app that answers the level above in one process with the level below.

    Args:
        group_of: finds the coordinator of the node that a message is for; the same object each
            time, since it keeps the plans of the run.
    """
    app = ClientApp()

    def answered(kind: str, message: Message, context: Context) -> Message:
        body, packed = from_record(message.content, kind)
        content = to_record(kind, *answer(group_of(context), kind, body, packed))
        return Message(content, reply_to=message)

    @app.query("profile")  # type: ignore[untyped-decorator]
    def profile(message: Message, context: Context) -> Message:
        return answered(PROFILE, message, context)

    @app.query("calibration")  # type: ignore[untyped-decorator]
    def calibration(message: Message, context: Context) -> Message:
        return answered(CALIBRATE, message, context)

    @app.train("lora")  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        return answered(TRAIN, message, context)

    @app.evaluate("loss")  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        return answered(EVALUATE, message, context)

    return app
