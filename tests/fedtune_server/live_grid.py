"""A grid whose devices come and go, as Flower's link shows it: for tests of deployments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from fedtune.flwr_compat import NodeInfo
from fedtune_server.simulation.grid import FIRST_NODE_ID, Fault, FaultHook, InProcessGrid


@dataclass
class Site:
    """What a registry says of a site."""

    state: str = "enrolled"


class LiveGrid(InProcessGrid):
    """Devices are online or not; a message to one that is not fails at once.

    Attributes:
        names: of the devices, in the order of their nodes.
        online: those that can be reached.
        looked: how often somebody looked who is there.
        on_look: called at each look with that count; may let devices come and go.
    """

    def __init__(self, fake: Any, fault: FaultHook | None = None, online: Any = None) -> None:
        self.names = tuple(fake.names)
        self.online: set[str] = set(self.names if online is None else online)
        self.activated: dict[str, int] = dict.fromkeys(self.names, 1)
        self.looked = 0
        self.on_look: Callable[[int], None] = lambda count: None
        self._own_fault = fault
        super().__init__(fake._app(), len(self.names), fault=self._befalls)

    def leave(self, name: str) -> None:
        self.online.discard(name)

    def come(self, name: str) -> None:
        """A device starts, for the first time or again."""
        self.online.add(name)
        self.activated[name] += 1

    def get_nodes(self) -> list[NodeInfo]:
        self.looked += 1
        self.on_look(self.looked)
        return [
            NodeInfo(
                node_id=FIRST_NODE_ID + i,
                status="online" if name in self.online else "offline",
                last_activated_at=str(self.activated[name]),
            )
            for i, name in enumerate(self.names)
        ]

    def _befalls(self, node: int, message: Message) -> Fault:
        if self.names[node - FIRST_NODE_ID] not in self.online:
            return "offline"
        return self._own_fault(node, message) if self._own_fault is not None else None


@dataclass
class Directory:
    """A registry of the sites of a grid."""

    names: tuple[str, ...]
    states: dict[str, Site] = field(default_factory=dict)

    def sites(self) -> Mapping[str, Site]:
        return {name: self.states.get(name, Site()) for name in self.names}

    def name_of_node(self, node_id: int) -> str | None:
        index = node_id - FIRST_NODE_ID
        return self.names[index] if index < len(self.names) else None
