"""How much somebody may ask, and how fast bytes go out: token buckets."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_PEERS = 4096


class Bucket:
    """Fills at `rate` a second up to `burst`; what is taken must be in it.

    Args:
        now: a clock in seconds that only moves forward.
    """

    def __init__(
        self, rate: float, burst: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._level, self._at = burst, now()

    def take(self, amount: float = 1.0) -> bool:
        """Take an amount if it is there; whether it was."""
        self._fill()
        if self._level < amount:
            return False
        self._level -= amount
        return True

    def owe(self, amount: float) -> float:
        """Take an amount, there or not; seconds to wait until it would have been."""
        self._fill()
        self._level -= amount
        return max(0.0, -self._level / self._rate)

    def _fill(self) -> None:
        now = self._now()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class PeerRates:
    """A bucket for each peer; those that were quiet longest are forgotten when there are many."""

    def __init__(
        self, rate: float, burst: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, peer: str, amount: float = 1.0) -> bool:
        """Whether the peer may have so much more; counts it."""
        bucket = self._buckets.pop(peer, None) or Bucket(self._rate, self._burst, self._now)
        self._buckets[peer] = bucket
        while len(self._buckets) > _MOST_PEERS:
            self._buckets.popitem(last=False)
        return bucket.take(amount)


class Bandwidth:
    """Shared by all downloads: bytes a second that leave, together.

    Args:
        bytes_per_s: 0: as fast as it goes.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bucket = Bucket(bytes_per_s, bytes_per_s / 4) if bytes_per_s else None

    async def pass_on(self, count: int) -> None:
        """Wait until so many bytes may leave."""
        if self._bucket is not None:
            await asyncio.sleep(self._bucket.owe(count))
