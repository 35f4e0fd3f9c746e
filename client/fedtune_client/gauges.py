"""A site's metrics in Prometheus' text form, in a file that its supervisor serves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, write_to_textfile

from fedtune.devices.usage import resident_bytes
from fedtune_client.link_speed import known_link
from fedtune_client.standing import Standing
from fedtune_client.traffic_day import Traffic

PERIOD_S: Final = 5.0

_log = logging.getLogger(__name__)


class Gauges:
    """What a site's `/metrics` says of its training.

    Args:
        file: is replaced as a whole.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._registry = file, CollectorRegistry()
        self._gauges: dict[str, Gauge] = {
            name: Gauge(f"fedtune_device_{name}", words, registry=self._registry)
            for name, words in _GAUGES.items()
        }
        self._counters: dict[str, Counter] = {
            name: Counter(f"fedtune_device_{name}", words, registry=self._registry)
            for name, words in _COUNTERS.items()
        }
        self._told: dict[str, int] = dict.fromkeys(_COUNTERS, 0)

    def write(self, standing: Standing, traffic: Traffic) -> None:
        """Set every figure, and write the file; a full disk is not an error."""
        link = known_link(self._file.parent)
        values = {
            "working": float(standing.state in ("training", "evaluating")),
            "round": standing.round,
            "step": standing.step,
            "steps": standing.steps,
            "resident_bytes": resident_bytes() or 0,
            "allowed_bytes": standing.allowed_bytes,
            "today_down_bytes": traffic.down,
            "today_up_bytes": traffic.up,
            "link_down_bytes_per_second": link.down_bytes_per_s,
            "link_up_bytes_per_second": link.up_bytes_per_s,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        for name, total in (("rounds", standing.rounds_done), ("refusals", standing.refusals)):
            self._counters[name].inc(total - self._told[name])
            self._told[name] = total
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(self._file), self._registry)
        except OSError as error:
            _log.warning("%s cannot be written (%s)", self._file, error.strerror)


class Ticker:
    """Calls a function now and then, in a thread of its own, until it is closed."""

    def __init__(self, call: Callable[[], None], period_s: float = PERIOD_S) -> None:
        self._call, self._period_s = call, period_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Begin; comes back at once."""
        self._thread.start()

    def close(self, wait_s: float = 1.0) -> None:
        """End the thread."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _run(self) -> None:
        while True:
            self._call()
            if self._ending.wait(self._period_s):
                return


_GAUGES: Final = {
    "working": "1 while the device trains or evaluates",
    "round": "round that the device works for, or last worked for",
    "step": "optimiser steps done of the round",
    "steps": "optimiser steps of the round",
    "resident_bytes": "memory of the training process",
    "allowed_bytes": "memory that a plan may take",
    "today_down_bytes": "bytes from the coordinator since midnight",
    "today_up_bytes": "bytes to the coordinator since midnight",
    "link_down_bytes_per_second": "measured speed from the coordinator",
    "link_up_bytes_per_second": "measured speed to the coordinator",
}
_COUNTERS: Final = {
    "rounds": "rounds that the device has trained",
    "refusals": "pieces of work that the device has refused",
}
