"""How often a site should ask for messages, by how many sites there are.

Flower's node asks every 3 s. For three sites that is slow: a round waits for each of its messages.
For two hundred it is a share of a core that does nothing else. The link tells its sites instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

HEADER: Final = "fedtune-poll"
"""Of an answer to a site: seconds until it should ask for messages again."""

POLLS_PER_S: Final = 20.0
"""All sites together; at 10 ms of processor each, a fifth of a core."""
LEAST_S, MOST_S = 1.0, 15.0
_GONE_S = 90.0
"""A site that has sent nothing for three heartbeats is not counted."""
_COUNT_EVERY_S = 5.0


class Pace:
    """Counts the sites that ask.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._counted = -_COUNT_EVERY_S
        self._poll_s = LEAST_S

    def poll_s(self, name: str) -> float:
        """Seconds after which a site that has just asked should ask again."""
        now = self._clock()
        self._last[name] = now
        if now - self._counted >= _COUNT_EVERY_S:
            self._counted = now
            self._last = {n: at for n, at in self._last.items() if now - at < _GONE_S}
            self._poll_s = min(MOST_S, max(LEAST_S, len(self._last) / POLLS_PER_S))
        return self._poll_s
