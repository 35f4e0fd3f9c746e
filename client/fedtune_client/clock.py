"""The seconds that a round's optimiser steps take."""

from __future__ import annotations

import time


class StepClock:
    """Told of every step of a round; starts when it is made."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def __call__(self, index: int, loss: float) -> None:
        """A step has ended."""
        self._times.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """Mean over the steps after the first, which also makes ready; of a single one, its own."""
        first = min(1, max(0, len(self._times) - 2))
        steps = len(self._times) - 1 - first
        return (self._times[-1] - self._times[first]) / steps if steps > 0 else 0.0
