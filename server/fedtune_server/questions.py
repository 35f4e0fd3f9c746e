"""Questions to devices beside rounds; where devices come and go, by the rule that rounds go by.

A device whose node begins anew, or is lost, before it has answered is asked again once it is there
(`returning`). Nobody is waited for whose question is known to be lost for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune_server.clock import FIRST_POLL_S, LONGEST_POLL_S, Clock, RealClock
from fedtune_server.exchange import (
    Answer,
    exchange,
    lost_answer,
    post,
    read_answer,
    silent_answer,
    unsent_answer,
)
from fedtune_server.presence import Again, Presence
from fedtune_server.returning import LOST, Returning, asked_again

_LEAST_S = 0.1
"""Time to live of a message; Flower takes none of zero."""


def ask(
    grid: Grid,
    contents: Mapping[str, RecordDict],
    nodes: Mapping[str, int],
    *,
    kind: str,
    group: str,
    deadline_s: float,
    again: Again | None,
    called: Callable[[str], str] = str,
) -> Iterator[Answer]:
    """Yield one answer per device, in the order of arrival, as `exchange` does.

    Args:
        deadline_s: from when a device is asked, for the first time or again.
        again: how it is asked again; None: devices stay, and each is asked once.
        called: what a person calls a device.
    """
    if again is None:
        return exchange(grid, contents, nodes, kind=kind, group=group, deadline_s=deadline_s)
    return _Question(grid, contents, nodes, kind, group, deadline_s, again, called).answers()


class _Question:
    """One question to several devices that come and go; see `ask`."""

    def __init__(
        self,
        grid: Grid,
        contents: Mapping[str, RecordDict],
        nodes: Mapping[str, int],
        kind: str,
        group: str,
        deadline_s: float,
        again: Again,
        called: Callable[[str], str],
    ) -> None:
        self._grid, self._contents, self._nodes = grid, contents, nodes
        self._kind, self._group, self._deadline_s = kind, group, deadline_s
        self._emit, self._called = again.emit, called
        self.clock: Clock = RealClock()
        self._last = self.clock.now() + again.longest_s
        self._open: dict[str, str] = {}
        self._ends: dict[str, float] = {}
        self._landed: list[Answer] = []
        self._lost: set[str] = set()
        self._told: dict[str, Answer] = {}
        self._presence = Presence(grid, nodes, again.reach)
        self._returning = Returning(self._presence, again.return_s, self, self._lost)

    def answers(self) -> Iterator[Answer]:
        """One per device; those that are not there when it begins are not asked."""
        here = self._presence.here()
        for device in sorted(self._contents.keys() - here.keys()):
            yield lost_answer(device, "it is not connected")
        self._ask(sorted(self._contents.keys() & here.keys()))
        poll_s = FIRST_POLL_S
        while self._open or self._lost or self._landed:
            self._pull()
            self._end_waits()
            for device in self._returning.back():
                self._emit(asked_again(self._called(device), self._kind))
                self._ask([device])
                poll_s = FIRST_POLL_S
            found, self._landed = self._landed, []
            yield from found
            poll_s = FIRST_POLL_S if found else min(poll_s * 1.5, LONGEST_POLL_S)
            if self._open or self._lost:
                self.clock.wait(poll_s, self._next_end())

    def _ask(self, devices: Iterable[str]) -> None:
        now = self.clock.now()
        ttl_s = dict.fromkeys(devices, max(_LEAST_S, min(self._deadline_s, self._last - now)))
        self._returning.asks(ttl_s)
        contents = {device: self._contents[device] for device in ttl_s}
        ids = post(
            self._grid, contents, self._nodes, kind=self._kind, group=self._group, ttl_s=ttl_s
        )
        self._open |= ids
        self._ends |= {device: now + seconds for device, seconds in ttl_s.items()}
        for device in sorted(contents.keys() - set(ids.values())):
            self._take(unsent_answer(device))

    def _pull(self) -> None:
        if not self._open:
            return
        for reply in self._grid.pull_messages(list(self._open)):
            device = self._open.pop(reply.metadata.reply_to_message_id, None)
            if device is not None:
                self._take(read_answer(device, self._nodes[device], reply, self._kind))

    def _take(self, answer: Answer) -> None:
        """Let an answer count, but for one that says that the question was lost: that can heal."""
        if answer.code in LOST and self._returning.may_ask(answer.device):
            self._lost.add(answer.device)
            self._told[answer.device] = answer
        else:
            self._landed.append(answer)

    def _end_waits(self) -> None:
        """Let those fail whose time is over, and those that did not come back."""
        now = self.clock.now()
        for message_id, device in list(self._open.items()):
            if now >= self._ends[device]:
                del self._open[message_id]
                self._landed.append(silent_answer(device, self._deadline_s))
        awaited = self._returning.waited_for() if now < self._last else []
        for device in sorted(self._lost.difference(awaited)):
            self._lost.discard(device)
            self._landed.append(self._told[device])

    def _next_end(self) -> float:
        ends = [self._ends[device] for device in self._open.values()]
        returns = self._returning.end()
        return min([self._last, *ends, *([returns] if returns is not None else [])])

    # ------------------------------------------------------------ for `Returning`

    def unanswered(self) -> list[str]:
        return list(self._open.values())

    def drop(self, device: str) -> None:
        self._open = {i: each for i, each in self._open.items() if each != device}

    def give_up(self, device: str, reason: str) -> None:
        self.drop(device)
        self._landed.append(lost_answer(device, reason))
