"""Which of the link's nodes are devices of a run, and how long a run waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.serverapp import Grid

from fedtune.errors import RoundError
from fedtune.records import Event
from fedtune_server.fleet import Emit, wait_for_nodes

ALL_SITES = "*"
"""In `deployment.sites`: every site that is enrolled."""

GRACE_S = 15.0
"""Wait for further sites once enough are there; a few of a Flower node's polls (3 s), chosen."""

_POLL_S = 1.0
_AWAY = ("offline", "registered", "unregistered")
"""What Flower says of nodes that cannot be reached; a node that it lists otherwise can."""


class Roster(Protocol):
    """Tells the devices of a run from other nodes."""

    @property
    def expected(self) -> int:
        """Devices that the run is for, as far as that is known before they come."""
        ...

    @property
    def needed(self) -> int:
        """Devices without which the run does not start."""
        ...

    @property
    def live(self) -> bool:
        """Whether devices come and go while the run lasts."""
        ...

    @property
    def patience_s(self) -> float:
        """Longest wait for devices that are not there, where they come and go; in seconds."""
        ...

    def wait(self, grid: Grid, deadline_s: float, emit: Emit) -> list[int]:
        """The nodes that the run starts with, once enough are there.

        Raises:
            RoundError: too few came in time.
        """
        ...

    def here(self, grid: Grid) -> Mapping[int, str]:
        """Nodes of the run's devices that can be reached now -> when each was last activated."""
        ...

    def called(self, node: int) -> str:
        """The name of a node's site, or of the node where it has none."""
        ...

    def objection(self, node: int, name: str) -> str:
        """Why a node that calls itself so does not take part; empty where it may."""
        ...


@dataclass(frozen=True, slots=True)
class Counted:
    """A simulated fleet: a number of nodes, which stay, under the names that they give."""

    expected: int
    needed: int = 1
    live: bool = False
    patience_s: float = 0.0

    def wait(self, grid: Grid, deadline_s: float, emit: Emit) -> list[int]:
        return wait_for_nodes(grid, self.expected, deadline_s)

    def here(self, grid: Grid) -> Mapping[int, str]:
        return dict.fromkeys(grid.get_node_ids(), "")

    def called(self, node: int) -> str:
        return f"node {node}"

    def objection(self, node: int, name: str) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Registered:
    """The sites of a deployment, by the coordinator's registry.

    Attributes:
        sites: names of those that take part; `*` among them: all that are enrolled.
        enrolled: names of all sites that may connect now.
        name_of_node: Flower node id -> the site whose key it has; None: nobody's.
        minimum: sites without which the run does not start; 0: all that are named.
        least: of `*`, where no minimum is given.
        patience_s: longest wait for them.
        grace_s: wait for the others after that.
    """

    sites: tuple[str, ...]
    enrolled: Callable[[], Collection[str]]
    name_of_node: Callable[[int], str | None]
    minimum: int = 0
    least: int = 1
    patience_s: float = 600.0
    grace_s: float = GRACE_S

    @property
    def live(self) -> bool:
        return True

    @property
    def expected(self) -> int:
        return max(len(self._wanted()), self.needed)

    def _wanted(self) -> list[str]:
        return sorted(self.enrolled() if ALL_SITES in self.sites else set(self.sites))

    @property
    def needed(self) -> int:
        named = 0 if ALL_SITES in self.sites else len(set(self.sites))
        return max(1, self.minimum or named or self.least)

    def wait(self, grid: Grid, deadline_s: float, emit: Emit) -> list[int]:
        """As in `Roster`; each change of who is there is told."""
        begin = time.monotonic()
        told: list[str] | None = None
        enough_at: float | None = None
        while True:
            nodes = {self.name_of_node(node) or "": node for node in self.here(grid)}
            wanted, now = self._wanted(), time.monotonic()
            missing = [name for name in wanted if name not in nodes]
            if told != sorted(nodes):
                told = sorted(nodes)
                self._tell(told, missing, emit)
            enough = len(nodes) >= self.needed
            enough_at = (enough_at or now) if enough else None
            if enough_at is not None and (not missing or now - enough_at >= self.grace_s):
                return sorted(nodes.values())
            if now - begin > self.patience_s:
                if enough:
                    return sorted(nodes.values())
                raise RoundError(self._too_few(told, missing))
            time.sleep(min(_POLL_S, self.grace_s / 10))

    def _tell(self, here: list[str], missing: list[str], emit: Emit) -> None:
        fields = {"needed": self.needed, "here": here, "missing": missing}
        emit(Event("sites_awaited", fields))

    def _too_few(self, here: list[str], missing: list[str]) -> str:
        absent = f"; missing: {', '.join(missing[:10])}" if missing else ""
        return (
            f"expected {self.needed} sites within {self.patience_s:g} s "
            f"(deployment.deadline_s), found {', '.join(here[:10]) or 'none'}{absent}; start them "
            "with fedtune client start, or lower deployment.minimum"
        )

    def here(self, grid: Grid) -> Mapping[int, str]:
        return {
            int(info.node_id): str(info.last_activated_at)
            for info in grid.get_nodes()
            if info.status not in _AWAY and self._takes_part(self.name_of_node(int(info.node_id)))
        }

    def _takes_part(self, name: str | None) -> bool:
        if name is None or name not in self.enrolled():
            return False
        return ALL_SITES in self.sites or name in self.sites

    def called(self, node: int) -> str:
        return self.name_of_node(node) or f"node {node}"

    def objection(self, node: int, name: str) -> str:
        known = self.name_of_node(node)
        if known is None:
            return f"node {node} belongs to no site; invite it with fedtune server invite"
        if known != name:
            return (
                f"{known} calls itself {name!r}; set site.name in its client.toml to the name that "
                "it was invited under"
            )
        return ""
