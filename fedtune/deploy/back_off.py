"""How long to wait before a process that ended is started again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fedtune.deploy.exit_codes import EXIT_RESTART, EXIT_WANTED


@dataclass(frozen=True, slots=True)
class Waits:
    """Bounds of the waits, in seconds; doubled from the first to the longest.

    Attributes:
        healthy_s: a process that lived this long starts again from the first wait.
        spread: at most this share is added by chance, so that many machines that lost the same
            coordinator do not all come back at once.
        loop_after: failures in a row that are called a crash loop.
    """

    first_s: float = 1.0
    longest_s: float = 60.0
    healthy_s: float = 600.0
    spread: float = 0.25
    loop_after: int = 5


class BackOff:
    """Counts the ends of one process and says how long to wait."""

    def __init__(self, waits: Waits, chance: random.Random) -> None:
        self._waits = waits
        self._chance = chance
        self._ends = 0
        self._failures = 0

    @property
    def in_crash_loop(self) -> bool:
        """Whether it failed again and again; an exit that asks for a restart is no failure."""
        return self._failures >= self._waits.loop_after

    def lived(self, seconds: float) -> None:
        """The process is up for so long: what was before may be forgotten."""
        if seconds >= self._waits.healthy_s:
            self._ends = self._failures = 0

    def wait_s(self, *, lived_s: float, exit_code: int) -> float:
        """The wait after an end.

        Args:
            lived_s: how long the process was up.
            exit_code: negative: the number of the signal that ended it.
        """
        self.lived(lived_s)
        base = min(self._waits.first_s * 2.0 ** min(self._ends, 30), self._waits.longest_s)
        self._ends += 1
        self._failures += exit_code not in (EXIT_WANTED, EXIT_RESTART)
        wait = base * (1.0 + self._waits.spread * self._chance.random())
        return min(wait, self._waits.longest_s)
