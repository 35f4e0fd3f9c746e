"""How often somebody may ask, and how much one request may hold."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_NAMES = 10_000
"""Buckets that are kept: more peers than this at once share forgotten, full ones."""


class RateLimit:
    """One token bucket per name.

    Args:
        per_s: tokens that come back per second.
        burst: tokens of a full bucket.
        clock: seconds, monotonic.
    """

    def __init__(
        self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def is_empty(self, name: str) -> bool:
        """Whether a name has nothing left to spend; spends nothing."""
        return self._level(name) < 1.0

    def spend(self, name: str) -> bool:
        """Take one token; False: there is none, and the request is one too many."""
        level = self._level(name)
        enough = level >= 1.0
        self._buckets[name] = (level - 1.0 if enough else level, self._clock())
        self._buckets.move_to_end(name)
        if len(self._buckets) > _MOST_NAMES:
            self._buckets.popitem(last=False)
        return enough

    def _level(self, name: str) -> float:
        level, at = self._buckets.get(name, (self._burst, self._clock()))
        return min(self._burst, level + (self._clock() - at) * self._per_s)
