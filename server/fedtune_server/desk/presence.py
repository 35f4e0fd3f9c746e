"""Which sites are there, what they last told of themselves, and what they are told at once.

A site is online while it tells of itself; Flower's own heartbeats notice a lost one later. The
records are read from any thread and changed by the services' event loop and by who stops runs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedtune.deploy.channel import one_line
from fedtune_server.desk.view import Refusal, SiteReport

OFFLINE_AFTER_S = 30.0
_MOST_REFUSALS = 300


@dataclass(slots=True)
class _Known:
    seen: float = 0.0  # by the clock that only moves forward
    seen_at: str = ""
    report: SiteReport | None = None
    orders: list[Orders] = field(default_factory=list)


class Orders:
    """What one site's stream is to be told; `wait` returns when it is told anew."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed = asyncio.Event()
        self.replaced = False

    def announce(self) -> None:
        """Wake the stream, from any thread."""
        # A loop that is closed has no streams left to wake.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self, seconds: float) -> bool:
        """Whether there is something new, after at most so many seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class Presence:
    """The sites that are connected or were.

    Args:
        now: a clock in seconds that only moves forward.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._stopped: tuple[str, ...] = ()
        self._refusals: deque[Refusal] = deque(maxlen=_MOST_REFUSALS)

    # ------------------------------------------------------------ what sites tell

    @contextmanager
    def connected(self, site: str) -> Iterator[Orders]:
        """The orders of a site's new stream; an older stream of that site is told to end."""
        orders = Orders(asyncio.get_running_loop())
        with self._lock:
            known = self._known.setdefault(site, _Known())
            for older in known.orders:
                older.replaced = True
                older.announce()
            known.orders = [orders]
            self._see(known)
        try:
            yield orders
        finally:
            with self._lock:
                if orders in known.orders:
                    known.orders.remove(orders)

    def hear(self, site: str, report: SiteReport) -> None:
        """Take what a site told of itself."""
        with self._lock:
            known = self._known.setdefault(site, _Known())
            before = known.report.last_refusal if known.report is not None else ""
            # The first word after a start of the desk may be of a refusal of days ago.
            old = known.report is None and report.state != "refusing"
            known.report = report
            self._see(known)
        if report.last_refusal and report.last_refusal != before and not old:
            self.refuse(site, "work", report.last_refusal)

    def _see(self, known: _Known) -> None:
        known.seen, known.seen_at = self._now(), utc_now()

    # ------------------------------------------------------------ what they are told

    @property
    def stopped(self) -> tuple[str, ...]:
        """Names of the runs that are stopped now."""
        with self._lock:
            return self._stopped

    def order(self, stopped: tuple[str, ...]) -> None:
        """Tell every site which runs are stopped; replaces what was told before."""
        with self._lock:
            if stopped == self._stopped:
                return
            self._stopped = stopped
            streams = [orders for known in self._known.values() for orders in known.orders]
        for orders in streams:
            orders.announce()

    # ------------------------------------------------------------ what others ask

    def look(self, site: str) -> tuple[bool, str, SiteReport | None]:
        """Whether a site is online, when it was last seen, and its last report."""
        with self._lock:
            known = self._known.get(site)
            if known is None:
                return False, "", None
            online = bool(known.orders) and self._now() - known.seen < OFFLINE_AFTER_S
            return online, known.seen_at, known.report

    def refuse(self, who: str, what: str, reason: str) -> None:
        """Keep a refusal, to be looked at."""
        kind = "work" if what == "work" else "call"
        refusal = Refusal(utc_now(), one_line(who, 200), kind, one_line(reason, 500))  # type: ignore[arg-type]
        with self._lock:
            self._refusals.appendleft(refusal)

    def refusals(self) -> tuple[Refusal, ...]:
        """The last refusals, the newest first."""
        with self._lock:
            return tuple(self._refusals)


def utc_now() -> str:
    """Now, UTC, ISO 8601, in milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
