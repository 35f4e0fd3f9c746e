"""The time that rounds go by: this machine's, or a simulated fleet's.

A round waits for answers until its deadline. On a network that is real time. In a simulation with
delays nothing has to be waited for: the clock jumps to the next answer, or to the deadline, so a
round of an hour is over as soon as its numbers are computed, and two runs go by the same times.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Protocol

FIRST_POLL_S, LONGEST_POLL_S = 0.002, 1.0
_LAST_STRETCH_S = 0.05
"""Before the deadline, waits are short again, so that no answer that is there goes unseen."""


class Clock(Protocol):
    """Seconds since some moment, and a way to let them go by."""

    @property
    def virtual(self) -> bool:
        """Whether its seconds are those of simulated devices."""
        ...

    @property
    def slack_s(self) -> float:
        """That a message may live beyond what its device is allowed: the clock may stand still."""
        ...

    def now(self) -> float:
        """Seconds; never less than before."""
        ...

    def wait(self, poll_s: float, end: float) -> None:
        """Let time go by until an answer may have come, and no further than `end`.

        Args:
            poll_s: how long to wait before looking again, where nobody tells of answers.
        """
        ...


class RealClock:
    """This machine's time."""

    virtual = False
    slack_s = 0.0

    def now(self) -> float:
        return time.monotonic()

    def wait(self, poll_s: float, end: float) -> None:
        before_last_stretch = end - _LAST_STRETCH_S - self.now()
        time.sleep(min(poll_s, max(FIRST_POLL_S, before_last_stretch)))


class LinkClock(RealClock):
    """This machine's time, which stands still while the coordinator's link is away.

    A device cannot answer then, and what it was allowed does not go by.

    Args:
        away_s: how long the link was away in all, in seconds; it grows only in calls to the link.
    """

    slack_s = 60.0

    def __init__(self, away_s: Callable[[], float]) -> None:
        self._away_s = away_s

    def now(self) -> float:
        return time.monotonic() - self._away_s()


class VirtualClock:
    """A time that stands still while devices compute, and jumps from answer to answer."""

    virtual = True
    slack_s = 0.0

    def __init__(self) -> None:
        self._now = 0.0
        self._alarms: list[float] = []

    def now(self) -> float:
        return self._now

    def alarm(self, at: float) -> None:
        """Make a wait end at a moment, because an answer comes then."""
        heapq.heappush(self._alarms, at)

    def wait(self, poll_s: float, end: float) -> None:
        """Go on to the next alarm, or to `end` if that comes first."""
        while self._alarms and self._alarms[0] <= self._now:
            heapq.heappop(self._alarms)
        nearest = self._alarms[0] if self._alarms else end
        self._now = max(self._now, min(nearest, end))
