"""Send one message to each of several devices and take the answers as they come.

Flower's own `send_and_receive` returns when all have answered; a person wants to see each device
report, and a coordinator wants to go on at a deadline. Every message has a time to live, so a
device that comes back late is told so by Flower, and every wait has an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import ProtocolError
from fedtune.flwr_compat import ErrorCode, readable_reason
from fedtune.wire.flower import from_record
from fedtune_server.clock import FIRST_POLL_S, LONGEST_POLL_S, RealClock

_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back from one device.

    Attributes:
        failure: why there is nothing to use, or empty.
        silent: whether the device did not answer at all.
        code: Flower's, of a failure that it tells of; 0 where it is the device's own.
    """

    device: str
    body: bytes = b""
    tensors: bytes | None = None
    failure: str = ""
    silent: bool = False
    code: int = 0


def exchange(
    grid: Grid,
    contents: Mapping[str, RecordDict],
    nodes: Mapping[str, int],
    *,
    kind: str,
    group: str,
    deadline_s: float,
) -> Iterator[Answer]:
    """Yield one answer per device, in the order of arrival; the silent ones fail at the deadline.

    Args:
        contents: device -> what to send it.
        nodes: device -> its Flower node id.
        kind: Flower message type; also the kind that the answer's record must have.
        group: shown by Flower beside the message; the round.
    """
    clock = RealClock()
    end = clock.now() + deadline_s
    ttl_s = dict.fromkeys(contents, deadline_s)
    waiting = post(grid, contents, nodes, kind=kind, group=group, ttl_s=ttl_s)
    for unsent in sorted(contents.keys() - set(waiting.values())):
        yield unsent_answer(unsent)
    poll_s = FIRST_POLL_S
    while waiting and clock.now() < end:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            device = waiting.pop(reply.metadata.reply_to_message_id, None)
            if device is not None:
                yield read_answer(device, nodes[device], reply, kind)
        poll_s = FIRST_POLL_S if replies else min(poll_s * 1.5, LONGEST_POLL_S)
        if waiting:
            clock.wait(poll_s, end)
    for device in waiting.values():
        yield silent_answer(device, deadline_s)


def post(
    grid: Grid,
    contents: Mapping[str, RecordDict],
    nodes: Mapping[str, int],
    *,
    kind: str,
    group: str,
    ttl_s: Mapping[str, float],
) -> dict[str, str]:
    """Send each device its message, in the order of their names; message id -> device.

    A device whose message Flower does not take, because its node is registered no more, has none.

    Args:
        ttl_s: device -> how long it may take to answer, in seconds.
    """
    order = sorted(contents)
    messages = [
        Message(
            contents[device],
            dst_node_id=nodes[device],
            message_type=kind,
            group_id=group,
            ttl=ttl_s[device],
        )
        for device in order
    ]
    # Flower gives None in place of the id of a message that it does not take.
    ids: Sequence[str | None] = list(grid.push_messages(messages))
    pairs = zip(ids, order, strict=True)
    return {message_id: device for message_id, device in pairs if message_id is not None}


def unsent_answer(device: str) -> Answer:
    """Stands for the answer to a message that Flower did not take."""
    return lost_answer(
        device, "Flower did not take its message: its node is not registered any more"
    )


def lost_answer(device: str, reason: str) -> Answer:
    """Stands for the answer to a message that was lost with its node."""
    return Answer(device, failure=reason, code=ErrorCode.NODE_UNAVAILABLE)


def read_answer(device: str, node: int, reply: Message, kind: str) -> Answer:
    """What a reply says, whatever it holds.

    Args:
        node: that was asked; what another node sends is no answer.
    """
    if reply.has_error():
        reason = readable_reason(reply.error.reason) or f"Flower error code {reply.error.code}"
        return Answer(device, failure=reason[:_MAX_REASON], code=reply.error.code)
    source = reply.metadata.src_node_id
    if source != node:
        return Answer(device, failure=f"expected an answer of node {node}, got one of {source}")
    try:
        body, tensors = from_record(reply.content, kind)
    except ProtocolError as error:
        return Answer(device, failure=str(error))
    return Answer(device, body, tensors)


def silent_answer(device: str, waited_s: float) -> Answer:
    """Stands for the answer that did not come."""
    return Answer(device, failure=f"no answer within {waited_s:g} s", silent=True)
