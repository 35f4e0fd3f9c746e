"""Which devices the link can reach now, and how long those that it lost are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid

from fedtune.records import Event
from fedtune_server.deadlines import Allowances

RETURN_S = 60.0
"""How long a device whose work was lost is waited for. Flower takes up to 60 s to let a node
that was killed connect again, and tells of the loss only 37 to 60 s after it; measured, 1.41."""

LOOK_S = 2.0
"""Between two looks at the link; each is a request, and a node's own polls take 3 s."""


class Reach(Protocol):
    """Tells which nodes there are; a `Roster` does."""

    def here(self, grid: Grid) -> Mapping[int, str]:
        """Nodes that can be reached now -> when each was last activated."""
        ...


class Presence:
    """Looks who is there, at most every few seconds.

    Attributes:
        looked: when it last looked, in seconds of this machine's monotonic clock.
    """

    def __init__(
        self, grid: Grid, nodes: Mapping[str, int], roster: Reach, every_s: float = LOOK_S
    ) -> None:
        self._grid, self._roster, self._every_s = grid, roster, every_s
        self._name_of = {node: name for name, node in nodes.items()}
        self._here: Mapping[str, str] = {}
        self.looked = float("-inf")

    def here(self) -> Mapping[str, str]:
        """Devices of the fleet that can be reached -> when each was last activated."""
        now = time.monotonic()
        if now - self.looked >= self._every_s:
            found = self._roster.here(self._grid)
            self._here = {
                self._name_of[node]: at for node, at in found.items() if node in self._name_of
            }
            self.looked = now
        return self._here


@dataclass(frozen=True, slots=True)
class Live:
    """What a round is told where its devices come and go.

    Attributes:
        patience_s: longest wait for devices without which the round cannot be.
        return_s: for one whose work was lost, to do it again.
    """

    presence: Presence
    allowances: Allowances
    patience_s: float
    return_s: float = RETURN_S


@dataclass(frozen=True, slots=True)
class Again:
    """What is told beside rounds of how devices come and go.

    Attributes:
        longest_s: that a question may take, however often a device is asked it.
        emit: told of each time that a device is asked again.
        return_s: for a device whose question was lost, to be asked it again.
    """

    reach: Reach
    longest_s: float
    emit: Callable[[Event], None]
    return_s: float = RETURN_S
