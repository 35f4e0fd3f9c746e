"""The Flower ClientApp of a group: the message types of a device, handed to its coordinator."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.wire.flower import from_record, make_forwarding_app, to_record
from fedtune_server.hierarchy.answering import answer
from fedtune_server.hierarchy.sub_coordinator import SubCoordinator


def make_group_app(group_of: Callable[[Context], SubCoordinator]) -> ClientApp:
    """Build the app that answers the level above in one process with the level below.

    Args:
        group_of: finds the coordinator of the node that a message is for; the same object each
            time, since it keeps the plans of the run.
    """

    def answered(kind: str, message: Message, context: Context) -> Message:
        body, packed = from_record(message.content, kind)
        content = to_record(kind, *answer(group_of(context), kind, body, packed))
        return Message(content, reply_to=message)

    return make_forwarding_app(answered)
