"""How many threads torch uses for many small steps, found out while they run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

_MOST: Final = 4
"""With more threads, products of a few hundred rows gain nothing."""
_PATIENCE: Final = 2
"""Slow steps in a row that are enough to give threads up; one alone may be an accident."""


class ThreadChoice:
    """Uses a few threads for as long as they are faster than one.

    On a quiet machine they are. On a busy one they wait for each other at every small product,
    and a step can take ten times as long as with one, so they are given up for good.

    Attributes:
        few: threads to use while they are worth it.
    """

    def __init__(self) -> None:
        self.few = min(torch.get_num_threads(), _MOST)
        self._one_s = float("inf")
        self._slow = 0

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Set the threads of a step, and learn from how long it takes.

        Args:
            index: from 0. The first two steps use one thread; the first is never typical.
        """
        alone = index < 2 or self.few == 1
        torch.set_num_threads(1 if alone else self.few)
        started = time.perf_counter()
        yield
        took_s = time.perf_counter() - started
        if index == 1:
            self._one_s = took_s
        if not alone:
            self._slow = self._slow + 1 if took_s > self._one_s else 0
            if self._slow >= _PATIENCE:
                self.few = 1


@contextmanager
def threads_restored() -> Iterator[None]:
    """Put torch's number of threads back afterwards."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
