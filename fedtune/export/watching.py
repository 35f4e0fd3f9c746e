"""A run as it goes on, read from its folder: its events as they come, and alarms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from fedtune import records
from fedtune.export.alarms import Alarm, Alarms
from fedtune.export.ledger_facts import Line
from fedtune.export.ledger_tail import LedgerTail, fields_of
from fedtune.export.run_place import coordinator_at_work
from fedtune.export.run_settings import deadline_s, usual_deadline_s
from fedtune.export.run_view import RunState, run_state
from fedtune.records import Event

_POLL_S = 0.5
_LOCK_AFTER_S = 5.0
"""Silence after which it is asked whether a coordinator is at work at all."""


class RunWatch:
    """Follows the run in a folder, which need not be there yet.

    Args:
        now: the clock, in UTC.
        sleep: waits so many seconds.
        at_work: whether a coordinator is at work in the folder; None: that cannot be told.
    """

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], None] = time.sleep,
        at_work: Callable[[Path], bool | None] = coordinator_at_work,
    ) -> None:
        self._folder, self._now, self._sleep, self._at_work = folder, now, sleep, at_work
        self._tail = LedgerTail(folder / "ledger.jsonl")
        self._alarms = Alarms(deadline_s(folder))
        self._quiet_s = 0.0
        self.state: RunState = "starting"

    def events(self) -> Iterator[Event]:
        """The run's events from its first, and the alarms among them, until the run ends.

        Raises:
            RunError: the ledger cannot be read, or a whole line is not a JSON object.
        """
        while True:
            news = self._tail.read()
            if news.anew:
                self.state, self._alarms = "starting", Alarms(deadline_s(self._folder))
                yield _alarm(_REPLACED)
            if news.lines:  # the settings are in the folder before the first line
                self._alarms.deadline_s = deadline_s(self._folder)
            for line in news.lines:
                yield _event(line)
                yield from map(_alarm, self._alarms.hear(line))
            if news.lines:
                self._quiet_s, told = 0.0, run_state(news.lines)
                self.state = self.state if told == "starting" else told
            if self._is_over():
                return
            silence = self._alarms.silence(self._now())
            if self.state == "stopped":
                yield _alarm(_GONE)
                return
            if silence:
                yield _alarm(silence)
            self._wait(_POLL_S)

    def _wait(self, seconds: float) -> None:
        self._sleep(seconds)
        self._quiet_s += seconds

    def _is_over(self) -> bool:
        """Whether the run has ended; notices one that stopped without a word."""
        if self.state == "finished":
            return True
        if self.state in ("interrupted", "failed"):
            # A coordinator that continues the run has the lock before it writes.
            return self._at_work(self._folder) is not True
        if self.state == "running" and self._quiet_s >= _LOCK_AFTER_S:
            self._quiet_s = 0.0
            if self._at_work(self._folder) is False:
                self.state = "stopped"
        return False


class LedgerListener:
    """Hears the lines of a ledger that is elsewhere; nothing of it is on this machine.

    Args:
        deadline_s: how long a round may take, in seconds.
    """

    def __init__(self, deadline_s: float | None = None) -> None:
        self._deadline_s = usual_deadline_s() if deadline_s is None else deadline_s
        self._alarms = Alarms(self._deadline_s)

    def hear(self, line: Line) -> Iterator[Event]:
        """The event of a line, and the alarms that it raises."""
        yield _event(line)
        yield from map(_alarm, self._alarms.hear(line))

    def replaced(self) -> Event:
        """The alarm for a ledger that begins anew."""
        self._alarms = Alarms(self._deadline_s)
        return _alarm(_REPLACED)


_REPLACED = Alarm("replaced", "the run was replaced by a new one")
_GONE = Alarm(
    "gone", "the coordinator stopped without a word; run the same command again to continue"
)


def _event(line: Line) -> Event:
    # Of any kind that a ledger has; the documentation lists those that this code makes itself.
    return records.Event(str(line.get("kind")), fields_of(line))


def _alarm(alarm: Alarm) -> Event:
    return Event("alarm", {"alarm": alarm.name, "text": alarm.text})
