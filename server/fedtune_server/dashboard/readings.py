"""A run as the dashboard knows it: its ledger, read on as it grows, and what deserves attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedtune.errors import RunError
from fedtune.export.alarms import Alarm, Alarms
from fedtune.export.device_view import DeviceView, device_views
from fedtune.export.ledger_facts import LedgerFacts, Line, gather
from fedtune.export.ledger_tail import LedgerTail, line_time
from fedtune.export.run_settings import deadline_s
from fedtune.export.run_view import RunState, run_state

_KEPT_ALARMS = 50


@dataclass(frozen=True, slots=True)
class TimedAlarm:
    """An alarm and when its cause was written, UTC; None: it holds now."""

    alarm: Alarm
    time: datetime | None


@dataclass(frozen=True, slots=True)
class Reading:
    """A run's ledger at a moment.

    Attributes:
        state: that the ledger tells; whether a coordinator is at work, the desk knows.
        error: why the ledger cannot be read; empty: it can.
    """

    lines: Sequence[Line] = ()
    facts: LedgerFacts | None = None
    devices: tuple[DeviceView, ...] = ()
    alarms: tuple[TimedAlarm, ...] = ()
    state: RunState = "starting"
    error: str = ""


class RunReader:
    """Reads one run's ledger; a look costs what was added, and one pass when something was."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tail = LedgerTail(folder / "ledger.jsonl")
        self._begin()

    def _begin(self) -> None:
        self._lines: list[Line] = []
        self._alarms: Alarms | None = None
        self._heard: list[TimedAlarm] = []
        self._silence: Alarm | None = None
        self._reading = Reading()

    def read(self, now: datetime) -> Reading:
        """The run as its ledger tells it now."""
        try:
            news = self._tail.read()
        except RunError as error:
            return Reading(error=str(error))
        if news.anew:
            self._begin()
        if self._alarms is None and news.lines:  # the settings lie there before the first line
            self._alarms = Alarms(deadline_s(self._folder))
        if news.lines:
            self._take(news.lines)
        if self._alarms is not None and self._reading.state == "running":
            self._silence = self._alarms.silence(now) or self._silence
        current = [TimedAlarm(self._silence, None)] if self._silence else []
        known = self._reading
        return Reading(
            known.lines, known.facts, known.devices, (*current, *self._heard), known.state
        )

    def _take(self, lines: Sequence[Line]) -> None:
        self._silence = None
        for line in lines:
            self._lines.append(line)
            heard = self._alarms.hear(line) if self._alarms else ()
            self._heard[:0] = [TimedAlarm(alarm, line_time(line)) for alarm in heard]
        del self._heard[_KEPT_ALARMS:]
        facts = gather(self._lines)
        views = device_views(facts, self._lines)
        self._reading = Reading(self._lines, facts, views, (), run_state(self._lines))
