"""Which devices take part in a round: seeded, fair, and each no more often than it may."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedtune_server.fleet import choose_devices
from fedtune_server.state import Turns

_NEVER = Turns()


@dataclass(frozen=True, slots=True)
class Draw:
    """How the devices of a round are chosen.

    Attributes:
        count: devices of a round; 0: all that may take part.
        seed: of the draw; equal seeds, rounds and turns give equal devices.
        sampling: `fair`: who was left out longest goes first, among equals who took part least
            often, and among those the seed decides; `uniform`: by draw.
        turns: device -> how often it took part before the round.
        caps: device -> rounds in which it takes part at most; devices that it does not name, or
            names with 0, have no limit.
    """

    count: int = 0
    seed: int = 0
    sampling: Literal["fair", "uniform"] = "fair"
    turns: Mapping[str, Turns] = field(default_factory=dict)
    caps: Mapping[str, int] = field(default_factory=dict)

    def may(self, name: str) -> bool:
        """Whether a device has not yet taken part as often as it may."""
        cap = self.caps.get(name, 0)
        return cap == 0 or self.turns.get(name, _NEVER).taken < cap

    def choose(
        self,
        names: Collection[str],
        round: int,
        attempt: int = 0,
        *,
        count: int | None = None,
        last: Collection[str] = (),
    ) -> tuple[str, ...]:
        """The devices to ask, sorted; fewer than wanted where fewer may take part.

        Args:
            names: those to choose from.
            attempt: 0 for the first of a round; others draw anew.
            count: how many; default: the draw's own. 0 takes all.
            last: taken only where the others are too few, because they have failed in this round.
        """
        wanted = self.count if count is None else count
        allowed = sorted(name for name in names if self.may(name))
        if wanted == 0 or wanted >= len(allowed):
            return tuple(allowed)
        first = [name for name in allowed if name not in last]
        chosen = self._from(first, min(wanted, len(first)), round, attempt)
        rest = [name for name in allowed if name in last]
        return tuple(sorted([*chosen, *self._from(rest, wanted - len(chosen), round, attempt)]))

    def _from(self, names: Sequence[str], count: int, round: int, attempt: int) -> Sequence[str]:
        if count == 0 or count >= len(names):
            return names if count else ()
        if self.sampling == "uniform" and attempt == 0:
            return choose_devices(names, count, self.seed, round)
        order = np.random.default_rng([self.seed, round, 3, attempt]).permutation(len(names))
        drawn = [names[index] for index in order]
        if self.sampling == "fair":
            drawn.sort(key=self._turn)  # stable: ties go by the draw
        return drawn[:count]

    def _turn(self, name: str) -> tuple[int, int]:
        turns = self.turns.get(name, _NEVER)
        return turns.last, turns.taken
