"""Devices whose work was lost, and that may come back to do it; one rule for all they are asked.

A message that a node had taken when it died is not delivered again: the link says so once it marks
the node offline, or, where the node is back before that, only its new activation tells. A device
that is back in time is asked again, up to a number of times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from fedtune.flwr_compat import ErrorCode
from fedtune.records import Event
from fedtune_server.clock import Clock
from fedtune_server.presence import Presence

LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED)
"""Flower's codes of work that was lost with the node, or with the process that did it."""

MOST_TIMES = 3
"""That a device is asked one thing; one whose work is lost each time is not well."""


class Work(Protocol):
    """What devices were asked and have not answered."""

    @property
    def clock(self) -> Clock:
        """By which they are waited for."""
        ...

    def unanswered(self) -> Iterable[str]:
        """Devices whose answer may still come."""
        ...

    def drop(self, device: str) -> None:
        """Forget what a device was asked: it is lost, and so is its answer."""
        ...

    def give_up(self, device: str, reason: str) -> None:
        """As `drop`; and let it count as an answer that says that the work was lost."""
        ...


class Returning:
    """Whose work was lost, and who of them is back.

    Args:
        return_s: how long a device whose work was lost may take to come back, in seconds.
        lost: devices whose work was lost, as answers tell; whoever reads those keeps it up.
    """

    def __init__(self, presence: Presence, return_s: float, work: Work, lost: set[str]) -> None:
        self._presence, self._return_s, self._work, self._lost = presence, return_s, work, lost
        self._since: dict[str, float] = {}
        self._activated: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def asks(self, devices: Iterable[str]) -> None:
        """Devices are about to be asked; one that begins anew from here on may have lost that."""
        here = self._presence.here()
        for device in devices:
            self._activated[device] = here.get(device, "")
            self._times[device] = self._times.get(device, 0) + 1
            self._lost.discard(device)
            self._since.pop(device, None)

    def back(self) -> tuple[str, ...]:
        """Devices to ask again, by their names: their work was lost, and they are there."""
        here = self._presence.here()
        restarted = {
            device
            for device in self._work.unanswered()
            if began_anew(self._activated.get(device, ""), here.get(device, ""))
        }  # so soon that the link never called them offline
        for device in sorted(restarted):
            if self.may_ask(device):
                self._work.drop(device)
            else:
                self._work.give_up(device, f"its node began anew each of {MOST_TIMES} times")
        # A look from before the loss would still show the device that is gone.
        seen = [d for d in self.waited_for() if self._since[d] < self._presence.looked]
        return tuple(sorted(d for d in {*seen, *restarted} if d in here and self.may_ask(d)))

    def end(self) -> float | None:
        """Until when, by the work's clock, the last of them is waited for; None: nobody is."""
        waited_for = self.waited_for()
        return max((self._since[d] + self._return_s for d in waited_for), default=None)

    def waited_for(self) -> list[str]:
        """Devices whose work was lost, and that may still come back to be asked again."""
        now = self._work.clock.now()
        for device in self._lost:
            self._since.setdefault(device, now)
        return [d for d in self._lost if now - self._since[d] < self._return_s and self.may_ask(d)]

    def may_ask(self, device: str) -> bool:
        """Whether a device may be asked once more."""
        return self._times.get(device, 0) < MOST_TIMES


def began_anew(before: str, now: str) -> bool:
    """Whether a node that can be reached is another process than the one that was asked.

    Args:
        before: when it was last activated, as the link said when it was asked; empty: unknown.
        now: as it says now; empty: the node cannot be reached.
    """
    return now not in ("", before)


def asked_again(device: str, message: str, round: int | None = None) -> Event:
    """Tells of a device that is asked again what it had lost.

    Args:
        message: what it is asked, as Flower calls it.
        round: of training; None: it is asked beside rounds.
    """
    fields = {"device": device, "message": message}
    return Event("device_asked_again", fields if round is None else {"round": round, **fields})
