"""The only door to names that Flower does not promise to keep.

`flwr.app`, `flwr.serverapp`, `flwr.clientapp` and `flwr.simulation` are public. The rest of Flower
moves between releases, so each private name that the coordinator needs comes in here, with the
reason, and `tests/fedtune/test_flwr_compat.py` holds what is expected of it:

- `TaskIdentity`: `Message(...)` reads the run's id from this process-wide class and fails where
  nothing set it. Flower sets it in the processes it starts; the in-process grid is none of them.
- `message_to_proto`, `message_from_proto`: the serialisation that a message passes on a network,
  so that a simulated device never shares an object with the coordinator.
- `NodeInfo`: what `Grid.get_nodes` returns.
- `Run`: what `Grid.run` returns.
- `ErrorCode`: the codes that a coordinator sees in an error reply.
- `SUPERLINK_NODE_ID`: whom an error reply comes from when the link, and not the node, wrote it.
- `telemetry`: Flower reads its switch once, at its own first import, and reports by default.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "NodeInfo",
    "Run",
    "become_coordinator",
    "copy_over_wire",
    "quiet_flower",
    "readable_reason",
    "set_message_id",
    "set_source",
]


def become_coordinator(run_id: int) -> None:
    """Let this process create messages of a run, as the coordinator."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def copy_over_wire(message: Message) -> tuple[Message, int]:
    """The message as it is after its way over a network, and its size in bytes."""
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(MessageProto.FromString(data)), len(data)


def readable_reason(reason: str | None) -> str:
    """One line for a person out of the reason of an error reply.

    A network's reply says `<class 'ValueError'>:<'text'>`; one from Flower's simulation wraps that
    in a traceback with terminal colours, in which the text follows the last `Message:`.
    """
    text = _COLOURS.sub("", reason or "").strip()
    if _WRAPPED in text:
        text = text.rpartition(_WRAPPED)[2].strip().removesuffix("'>").removesuffix('">')
    elif match := _RAISED.fullmatch(text):
        name = match["name"].rpartition(".")[2]
        text = match["text"] if match["name"].startswith("fedtune.") else f"{name}: {match['text']}"
    lines = [line for line in text.splitlines() if line.strip()]
    return "".join(c for c in lines[0].strip() if c.isprintable()) if lines else ""


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"<class '(?P<name>[\w.]+)'>:<'(?P<text>.*)'>", re.DOTALL)
_WRAPPED = "Exception ClientAppException occurred. Message:"


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which in Flower only the link does."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Say which node a message comes from."""
    message.metadata.__dict__["_src_node_id"] = node_id


@contextmanager
def quiet_flower(level: int = logging.ERROR) -> Iterator[None]:
    """Keep Flower's log below `level` off the terminal, and its telemetry off the network.

    Telemetry stays on for a person who set FLWR_TELEMETRY_ENABLED to 1.
    """
    logger = logging.getLogger("flwr")
    level_before, telemetry_before = logger.level, telemetry.FLWR_TELEMETRY_ENABLED
    logger.setLevel(level)
    if os.environ.get("FLWR_TELEMETRY_ENABLED") is None:
        telemetry.FLWR_TELEMETRY_ENABLED = "0"
    try:
        yield
    finally:
        logger.setLevel(level_before)
        telemetry.FLWR_TELEMETRY_ENABLED = telemetry_before
