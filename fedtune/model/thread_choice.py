"""How many threads torch uses for many small steps, found out while they run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

_PERIOD: Final = 30
"""Steps between two trials. Chosen: the four steps of a trial then cost a few per cent at most on
a quiet machine, and a machine that has become busy or quiet is noticed within seconds."""
_MOST: Final = 4
"""With more threads, products of a few hundred rows gain nothing."""


class ThreadChoice:
    """Chooses between one thread and a few, again and again, by timing steps with each.

    On a quiet machine a few threads are faster. On a busy one they wait for each other at every
    small product, and a step can take five times as long as with one.
    """

    def __init__(self) -> None:
        self.few = min(torch.get_num_threads(), _MOST)
        self._best_s: dict[int, float] = {}

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Set the threads of one step, and time it when it is one of a trial's."""
        position = index % _PERIOD
        trial = (self.few, self.few, 1, 1)
        if self.few == 1 or position > len(trial):
            yield
            return
        if position == len(trial):
            torch.set_num_threads(self.fastest())
            yield
            return
        if position == 0:
            self._best_s.clear()
        threads = trial[position]
        torch.set_num_threads(threads)
        started = time.perf_counter()
        yield
        took = time.perf_counter() - started
        self._best_s[threads] = min(took, self._best_s.get(threads, took))

    def fastest(self) -> int:
        """The number of threads of the last trial's fastest step; a few before any trial."""
        return min(self._best_s, key=lambda n: self._best_s[n], default=self.few)


@contextmanager
def threads_restored() -> Iterator[None]:
    """Put torch's number of threads back afterwards."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
