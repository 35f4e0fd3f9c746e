"""Bytes that a site has exchanged with its coordinator today, over restarts of its processes.

The node counts since its own start (`state/link.json`); what it has counted is added up by day
(`state/traffic.json`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from fedtune.errors import RunError
from fedtune.wire.durable import write_durably

_MOST_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Traffic:
    """Attributes:
    day: local, as 2026-11-27.
    down, up: bytes of that day.
    seen_down, seen_up: the node's counters when they were last read.
    """

    day: str = ""
    down: int = 0
    up: int = 0
    seen_down: int = 0
    seen_up: int = 0

    @property
    def total(self) -> int:
        return self.down + self.up


class TrafficDay:
    """Adds up a day's traffic; one process of a site does, from any of its threads.

    Args:
        state: the site's folder of that name.
        now: local time.
    """

    def __init__(self, state: Path, now: Callable[[], datetime] = datetime.now) -> None:
        self._link, self._file, self._now = state / "link.json", state / "traffic.json", now
        self._lock = threading.Lock()
        self._kept = _traffic(read_object(self._file))

    def today(self) -> Traffic:
        """The traffic of this day, up to what the node last wrote."""
        with self._lock:
            return self._counted(self._now().date().isoformat())

    def _counted(self, day: str) -> Traffic:
        kept = self._kept if self._kept.day == day else replace(self._kept, day=day, down=0, up=0)
        link = read_object(self._link)
        down, up = count(link, "bytes_down"), count(link, "bytes_up")
        found = Traffic(
            day,
            kept.down + _since(kept.seen_down, down),
            kept.up + _since(kept.seen_up, up),
            down,
            up,
        )
        if found != self._kept:
            self._kept = found
            self._keep()
        return found

    def _keep(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._file, json.dumps(asdict(self._kept)).encode())
        except (OSError, RunError):
            # A full disk does not hold up the day's work; the count goes on in memory.
            return


def read_object(path: Path) -> dict[str, object]:
    """A small JSON object that another process may be about to write; empty where there is none."""
    try:
        with path.open("rb") as stream:
            tree = json.loads(stream.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def count(tree: dict[str, object], key: str) -> int:
    """A whole number of bytes under a key; 0 for anything else."""
    value = tree.get(key)
    return value if isinstance(value, int) and 0 <= value < 2**62 else 0


def _since(seen: int, now: int) -> int:
    """What a counter has grown by; a node that was started anew counts from 0."""
    return now - seen if now >= seen else now


def _traffic(tree: dict[str, object]) -> Traffic:
    day = tree.get("day")
    names = ("down", "up", "seen_down", "seen_up")
    return Traffic(day if isinstance(day, str) else "", *(count(tree, name) for name in names))
