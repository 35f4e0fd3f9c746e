"""Where a site stands at this moment: what it tells the coordinator, and its metrics."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Literal

State = Literal["idle", "waiting", "training", "evaluating", "downloading", "refusing"]

_MOST_LINES: Final = 500
_MOST_LINE: Final = 4000
"""Lines that wait to be sent, and characters of one: what comes while nobody reads pushes out the
oldest."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Attributes:
    run: the name of the run that is worked for; empty: none.
    step: optimiser steps done of this round, of `steps`.
    allowed_bytes: memory that a plan may take now; 0: not known yet.
    """

    state: State = "idle"
    run: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    allowed_bytes: int = 0
    last_refusal: str = ""
    rounds_done: int = 0
    refusals: int = 0


class StandingBoard:
    """The standing of one site, which its work changes and other threads read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._now, self._version = Standing(), 0

    def now(self) -> Standing:
        with self._changed:
            return self._now

    def change(self, **fields: object) -> None:
        """Put fields of `Standing` in place of the old ones."""
        with self._changed:
            self._now = replace(self._now, **fields)  # type: ignore[arg-type]  # named fields
            self._version += 1
            self._changed.notify_all()

    def wait(self, version: int, timeout_s: float) -> int:
        """Wait until something has changed since a version, or for so long; the version now."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)
            return self._version


class LogTail(logging.Handler):
    """The last lines of this process's log, until somebody takes them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record as one line; never blocks, and never fails."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": "executor",
            "logger": record.name,
            "message": record.getMessage()[:_MOST_LINE],
        }
        self._lines.append(json.dumps(line))

    def take(self, most: int = 100) -> list[str]:
        """The oldest lines that nobody has taken."""
        found: list[str] = []
        while self._lines and len(found) < most:
            found.append(self._lines.popleft())
        return found
