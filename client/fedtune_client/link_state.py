"""What a site's node knows of its link, in `HOME/state/link.json`: rates, bytes, clock.

    {"down_bytes_per_s": 1.2e6, "up_bytes_per_s": 3.1e5, "bytes_down": 81920, "bytes_up": 4096,
     "clock_offset_s": 0.0, "updated": 1795795200.0}

Rates are of the last exchanges that were large enough to tell; 0 until there was one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path

NAME = "link.json"
TELLING_BYTES = 200_000
"""Smaller exchanges measure the delay of the link and not its rate."""
WRITE_S = 2.0
CLOCK_TOLERANCE_S = 3.0
"""Clocks nearer than this are left alone: the coordinator's time comes in whole seconds."""

_NEW = 0.5  # weight of the newest exchange in a rate
_log = logging.getLogger("fedtune.node")


class LinkState:
    """Counts what is exchanged with the coordinator, and writes it down now and then."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = folder / NAME
        self._clock = clock
        self._lock = threading.Lock()
        self._written = -WRITE_S
        self._offset_known = False
        self.figures = read_link_state(folder)

    @property
    def clock_offset_s(self) -> float:
        """Seconds that the coordinator's clock is ahead of ours; 0 where they agree."""
        return self.figures["clock_offset_s"]

    def exchanged(self, up_bytes: int, down_bytes: int, seconds: float) -> None:
        """A request of so many bytes was answered with so many, after so long."""
        with self._lock:
            figures = self.figures
            figures["bytes_up"] += up_bytes
            figures["bytes_down"] += down_bytes
            for way, size in (("up", up_bytes), ("down", down_bytes)):
                if size >= TELLING_BYTES and seconds > 0:
                    old = figures[f"{way}_bytes_per_s"]
                    new = size / seconds
                    figures[f"{way}_bytes_per_s"] = new if not old else old + _NEW * (new - old)
            if not 0 <= self._clock() - self._written < WRITE_S:  # a clock may be set back
                self._write()

    def coordinator_says(self, date: str, round_trip_s: float) -> None:
        """Take the `Date` of an answer that came just now; of slow answers it is too old to use."""
        if round_trip_s > CLOCK_TOLERANCE_S:
            return
        try:
            theirs = parsedate_to_datetime(date).timestamp() + 0.5  # it is cut to whole seconds
        except (ValueError, TypeError):
            return
        offset = theirs - (self._clock() - round_trip_s / 2)
        with self._lock:
            wanted = offset if abs(offset) > CLOCK_TOLERANCE_S else 0.0
            if abs(wanted - self.clock_offset_s) <= CLOCK_TOLERANCE_S and self._offset_known:
                return
            changed = abs(wanted - self.clock_offset_s) > CLOCK_TOLERANCE_S
            self._offset_known = True
            self.figures["clock_offset_s"] = wanted
            self._write()
        if changed:
            _log.warning(
                "the coordinator's clock is %+.0f s from this machine's; it is followed", offset
            )

    def _write(self) -> None:
        self._written = self._clock()
        self.figures["updated"] = self._written
        made = self._path.with_suffix(".new")
        try:
            made.write_text(json.dumps(self.figures), encoding="utf-8")
            os.replace(made, self._path)
        except OSError as error:  # a full disk: the figures stay in memory
            _log.warning("%s cannot be written (%s)", self._path, error.strerror)


def read_link_state(folder: Path) -> dict[str, float]:
    """The figures of a site's state folder; zeros where there are none, or none that are whole."""
    zeros = {
        "down_bytes_per_s": 0.0,
        "up_bytes_per_s": 0.0,
        "bytes_down": 0,
        "bytes_up": 0,
        "clock_offset_s": 0.0,
        "updated": 0.0,
    }
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return zeros
    if not isinstance(found, dict):
        return zeros
    good = {name: found[name] for name in zeros if isinstance(found.get(name), (int, float))}
    return zeros | good
