"""A fleet in this process whose replies arrive when a virtual clock says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedtune_server.clock import VirtualClock
from fedtune_server.simulation.grid import InProcessGrid

Delay: TypeAlias = Callable[[Message], float | None]
"""Message -> virtual seconds that its device takes to reply; None: its reply takes no time."""


class DelayedGrid(InProcessGrid):
    """Devices that take virtual seconds, one message after the other.

    A device computes when its reply is due and asked for, and not at all if that never happens;
    those that can work together with it do so then. Replies come in the order in which they are
    due.

    Args:
        client_app, devices: as for `InProcessGrid`; so are the other options.
        delay: how long a device takes.
        clock: by which replies are due.
    """

    def __init__(
        self,
        client_app: ClientApp,
        devices: int,
        *,
        delay: Delay,
        clock: VirtualClock,
        **options: Any,  # those of InProcessGrid, which checks them
    ) -> None:
        super().__init__(client_app, devices, **options)
        assert not self._threads  # one worker: threads would compute what nobody asked for
        self._delay, self._clock = delay, clock
        self._due: dict[str, float] = {}
        self._free_at: dict[int, float] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages for their devices, and say when their replies are due.

        Raises:
            ValueError: a message goes to a node that does not exist.
        """
        pushed = list(messages)
        ids = super().push_messages(pushed)
        for message_id, message in zip(ids, pushed, strict=True):
            seconds = self._delay(message)
            if seconds is not None:
                node = message.metadata.dst_node_id
                at = max(self._clock.now(), self._free_at.get(node, 0.0)) + seconds
                self._due[message_id] = self._free_at[node] = at
                self._clock.alarm(at)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to the given messages that are due; their devices do their work in this call."""
        asked, now = list(message_ids), self._clock.now()
        due = [i for i in asked if self._due.get(i, now) <= now]
        while self._run_next(due, beside=asked):
            pass
        with self._changed:
            return [self._replies.pop(i) for i in self._in_order(due) if i in self._replies]

    def _in_order(self, ids: Sequence[str]) -> list[str]:
        return sorted(ids, key=lambda message_id: self._due.get(message_id, 0.0))

    def _ttl(self, message: Message) -> float:
        """No limit here: a message's seconds are virtual, and its coordinator counts them."""
        return math.inf
