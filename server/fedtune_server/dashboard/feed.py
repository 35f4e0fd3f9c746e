"""What the page shows, kept as text with a number for each part, so that only changes are sent.

A look at the desk is taken when somebody asks, and at most once in so many seconds, however many
pages are open.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedtune.deploy.certificates import days_left
from fedtune_server.dashboard.attention import attention, troubled_processes
from fedtune_server.dashboard.model import Deployment, Part, chosen_run, parts
from fedtune_server.dashboard.readings import Reading, RunReader
from fedtune_server.desk.view import DeskView

LEAST_S = 1.0
_COST_SHARE = 5.0
"""A look that takes long is taken seldom: its cost stays below a fifth of a core."""
_READERS = 8


class Readings:
    """Everything that is known of the deployment, read anew at each call.

    Args:
        certificate, supervisor: files of the coordinator's home.
    """

    def __init__(self, view: DeskView, certificate: Path, supervisor: Path) -> None:
        self._view, self.certificate, self._supervisor = view, certificate, supervisor
        self._readers: dict[str, RunReader] = {}
        self._lock = threading.Lock()

    def deployment(self, wanted: str, now: datetime | None = None) -> Deployment:
        """The deployment with the ledger of a run; safe to call from any thread.

        Args:
            wanted: name of a run; empty or unknown: the one that runs.
        """
        now = now or datetime.now(UTC)
        runs, sites = self._view.runs(), self._view.sites()
        shown = chosen_run(runs, wanted)
        with self._lock:
            reading = self._reader(shown.name).read(now) if shown else Reading()
        found = attention(
            runs,
            sites,
            reading,
            days_left(self.certificate, now),
            troubled_processes(self._supervisor),
        )
        return Deployment(runs, sites, self._view.refusals(), shown, reading, found)

    def _reader(self, name: str) -> RunReader:
        reader = self._readers.pop(name, None) or RunReader(self._view.folder(name))
        self._readers[name] = reader  # the last used stand last
        while len(self._readers) > _READERS:
            del self._readers[next(iter(self._readers))]
        return reader


@dataclass(slots=True)
class _Kept:
    version: int = 0
    parts: dict[str, tuple[int, str]] = field(default_factory=dict)
    next_look: float = 0.0
    epoch: str = field(default_factory=lambda: secrets.token_hex(4))


@dataclass(frozen=True, slots=True)
class Change:
    """What a page lacks.

    Attributes:
        id: what the page says when it comes back.
        whole: whether these are all parts, because what the page had is of no use.
        parts: JSON texts.
    """

    id: str
    whole: bool
    parts: Mapping[str, str]

    def json(self, now: datetime | None = None) -> str:
        """One line of JSON."""
        time = (now or datetime.now(UTC)).isoformat(timespec="milliseconds")
        inside = ",".join(f"{json.dumps(name)}:{text}" for name, text in self.parts.items())
        whole = "true" if self.whole else "false"
        return f'{{"time":"{time}","whole":{whole},"parts":{{{inside}}}}}'


class Feed:
    """Numbers the parts of each run's page; safe to call from any thread.

    Args:
        look: the parts of the page of a run.
        now: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        look: Callable[[str], Mapping[str, Part]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._now = look, now
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}

    def since(self, run: str, seen: str = "") -> Change:
        """What changed since the change with the id `seen`; all, if there is none such."""
        with self._lock:
            kept = self._kept.pop(run, None) or _Kept()
            self._kept[run] = kept
            while len(self._kept) > _READERS:
                del self._kept[next(iter(self._kept))]
            if self._now() >= kept.next_look:
                self._refresh(run, kept)
            epoch, _, number = seen.partition("-")
            known = epoch == kept.epoch and number.isdecimal() and number.isascii()
            after = int(number[:18]) if known else 0
            news = {name: text for name, (of, text) in kept.parts.items() if of > after}
            return Change(f"{kept.epoch}-{kept.version}", not known, news)

    def _refresh(self, run: str, kept: _Kept) -> None:
        began = self._now()
        found = {name: json.dumps(part) for name, part in self._look(run).items()}
        changed = {n: t for n, t in found.items() if kept.parts.get(n, (0, ""))[1] != t}
        if changed:
            kept.version += 1
        kept.parts = {
            name: (kept.version, text) if name in changed else kept.parts[name]
            for name, text in found.items()
        }
        took = self._now() - began
        kept.next_look = self._now() + max(LEAST_S, _COST_SHARE * took)


def page_feed(readings: Readings) -> Feed:
    """The feed of a coordinator's page."""
    return Feed(lambda run: parts(readings.deployment(run)))
