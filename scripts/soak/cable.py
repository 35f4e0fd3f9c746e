"""A cable between two network interfaces, with a delay, a loss and a rate of its own.

For kernels that cannot shape a link (`sch_netem` is a module that small ones leave out): two TAP
interfaces, and a thread that passes Ethernet frames from one to the other, late or not at all.
"""

from __future__ import annotations

import heapq
import os
import random
import select
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

DEVICE = Path("/dev/net/tun")
LONGEST_QUEUE_S = 0.5
"""Of frames that wait for a slow link; what comes on top is lost, as in a router."""
MOST_FRAMES = 1000
"""On their way in one direction; netem has the same default."""
_FRAME_BYTES = 65_536
_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000  # IFF_TAP | IFF_NO_PI
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Link:
    """How a link is shaped, in each direction; the defaults leave it as it is.

    Attributes:
        delay_ms: one way.
        jitter_ms: standard deviation of the delay.
        loss_percent: of packets.
        rate: as `tc` reads it, such as `1mbit`; empty: as fast as the machine.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_percent: float = 0.0
    rate: str = ""

    def words(self) -> list[str]:
        """How `tc qdisc` shapes it; nothing where nothing is shaped."""
        words = []
        if self.delay_ms:
            jitter = [f"{self.jitter_ms:g}ms"] if self.jitter_ms else []
            words += ["delay", f"{self.delay_ms:g}ms", *jitter]
        if self.loss_percent:
            words += ["loss", f"{self.loss_percent:g}%"]
        if self.rate:
            words += ["rate", self.rate]
        return ["netem", *words] if words else []

    @property
    def bytes_per_s(self) -> float:
        """Of the rate; 0: unlimited."""
        if not self.rate:
            return 0.0
        return float(self.rate[:-4]) * _RATES[self.rate[-4:]] / 8


class _Way:
    """One direction: when a frame that comes now is to leave, if it is."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._free_at = self._last_at = 0.0

    def leaves_at(self, link: Link, size: int, now: float) -> float | None:
        if self._rng.random() * 100 < link.loss_percent:
            return None
        at = now
        if link.bytes_per_s:
            if self._free_at - now > LONGEST_QUEUE_S:
                return None
            at = self._free_at = max(now, self._free_at) + size / link.bytes_per_s
        at += max(0.0, self._rng.gauss(link.delay_ms, link.jitter_ms)) / 1e3
        self._last_at = max(at, self._last_at)  # frames do not overtake each other
        return self._last_at


class Cable:
    """Makes both interfaces, which go with it.

    Attributes:
        link: how it is shaped; may be changed while it is in use.

    Raises:
        OSError: this process may not make them.
    """

    def __init__(self, near: str, far: str, link: Link | None = None, seed: int = 0) -> None:
        self.link = link or Link()
        self._ends: list[int] = []
        try:
            self._ends += [_tap(near)]
            self._ends += [_tap(far)]
        except OSError:
            self._close()
            raise
        self._ways = [_Way(random.Random(f"{seed} {near} {way}")) for way in (0, 1)]
        self._wake = os.pipe()
        self._held: list[tuple[float, int, int, bytes]] = []
        self._counts = [0, 0]
        self._thread = threading.Thread(target=self._pass, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._wake[1], b"!")
        self._thread.join(10)
        self._close()
        for end in self._wake:
            os.close(end)

    def _close(self) -> None:
        for end in self._ends:
            os.close(end)

    def _pass(self) -> None:
        order = 0
        while True:
            wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            ready, _, _ = select.select([*self._ends, self._wake[0]], [], [], wait)
            if self._wake[0] in ready:
                return
            for way, end in enumerate(self._ends):
                if end in ready:
                    order = self._take(way, end, order)
            now = time.monotonic()
            while self._held and self._held[0][0] <= now:
                _, _, way, frame = heapq.heappop(self._held)
                self._counts[way] -= 1
                _write(self._ends[1 - way], frame)

    def _take(self, way: int, end: int, order: int) -> int:
        """Take up what has come; the number of the next frame."""
        for _ in range(64):  # and then the other direction's
            try:
                frame = os.read(end, _FRAME_BYTES)
            except OSError:  # no more, or the interface is down
                return order
            at = self._ways[way].leaves_at(self.link, len(frame), time.monotonic())
            if at is not None and self._counts[way] < MOST_FRAMES:
                heapq.heappush(self._held, (at, order, way, frame))
                self._counts[way] += 1
                order += 1
        return order


def _write(end: int, frame: bytes) -> None:
    try:
        os.write(end, frame)
    except OSError:  # the interface is down, or its queue is full: lost, as on any cable
        return


def _tap(name: str) -> int:
    if sys.platform != "linux":
        raise OSError(f"TAP interfaces of {DEVICE} need Linux, this is {sys.platform}")
    import fcntl

    end = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(end, _SET_INTERFACE, struct.pack("16sH", name.encode(), _TAP_WITHOUT_HEADER))
    except OSError:
        os.close(end)
        raise
    return end
