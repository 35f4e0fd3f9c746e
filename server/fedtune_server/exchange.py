"""Send one message to each of several devices and take the answers as they come.

Flower's own `send_and_receive` returns when all have answered; a person wants to see each device
report, and a coordinator wants to go on at a deadline. Every message has a time to live, so a
device that comes back late is told so by Flower, and every wait has an end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import ProtocolError
from fedtune.wire.flower import from_record
from fedtune_server.flwr_compat import readable_reason

_FIRST_POLL_S, _LONGEST_POLL_S = 0.002, 1.0
_LAST_STRETCH_S = 0.05
"""Before the deadline, waits are short again, so that no answer that is there goes unseen."""
_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back from one device.

    Attributes:
        failure: why there is nothing to use, or empty.
        silent: whether the device did not answer at all.
    """

    device: str
    body: bytes = b""
    tensors: bytes | None = None
    failure: str = ""
    silent: bool = False


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
    end = time.monotonic() + deadline_s
    order = sorted(contents)
    messages = [
        Message(
            contents[device],
            dst_node_id=nodes[device],
            message_type=kind,
            group_id=group,
            ttl=deadline_s,
        )
        for device in order
    ]
    waiting = dict(zip(grid.push_messages(messages), order, strict=True))
    poll_s = _FIRST_POLL_S
    while waiting and time.monotonic() < end:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            device = waiting.pop(reply.metadata.reply_to_message_id, None)
            if device is not None:
                yield _answer(device, reply, kind)
        poll_s = _FIRST_POLL_S if replies else min(poll_s * 1.5, _LONGEST_POLL_S)
        if waiting:
            before_last_stretch = end - _LAST_STRETCH_S - time.monotonic()
            time.sleep(min(poll_s, max(_FIRST_POLL_S, before_last_stretch)))
    for device in waiting.values():
        yield Answer(device, failure=f"no answer within {deadline_s:g} s", silent=True)


def _answer(device: str, reply: Message, kind: str) -> Answer:
    if reply.has_error():
        reason = readable_reason(reply.error.reason) or f"Flower error code {reply.error.code}"
        return Answer(device, failure=reason[:_MAX_REASON])
    try:
        body, tensors = from_record(reply.content, kind)
    except ProtocolError as error:
        return Answer(device, failure=str(error))
    return Answer(device, body, tensors)
