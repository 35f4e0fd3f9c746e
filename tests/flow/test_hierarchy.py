"""Two groups of two devices train as the same four devices do without groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context

from fedtune.config import parse_run_config
from fedtune.model.shapes import read_shapes
from fedtune.records import Event
from fedtune_client.app import make_client_app
from fedtune_client.site import SimulatedFleet, SiteSettings
from fedtune_server.coordinator import Coordinator
from fedtune_server.hierarchy import Group, SubCoordinator, make_group_app
from fedtune_server.roster import Counted
from fedtune_server.run_folder import RunFolder
from fedtune_server.simulation.grid import InProcessGrid

Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Half:
    """Two of the four sites of a simulated fleet."""

    fleet: SimulatedFleet
    first: int

    def __call__(self, node_config: Mapping[str, object]) -> SiteSettings:
        partition = node_config["partition-id"]
        assert isinstance(partition, int)
        return self.fleet({**node_config, "partition-id": self.first + partition})


def losses(events: list[Event]) -> list[float]:
    found = [e.fields["held_out_loss"] for e in events if e.kind == "round_finished"]
    found += [e.fields["held_out_loss"] for e in events if e.kind == "evaluated"]
    return found  # type: ignore[return-value]


def test_losses_of_three_rounds_equal_those_of_the_flat_run(
    tree: Tree, play: Callable[[Tree], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    tree["run"]["rounds"] = 3
    tree["lora"] = {"rank_max": 4, "rank_cap": 8}
    tree["importance"] = {"method": "uniform"}
    tree["plan"] = {"steps": "equal"}
    tree["fleet"] = {
        "small": {"count": 2, "memory": "32 MB", "formats": ["fp32"], "rank": 2},
        "large": {"count": 2, "memory": "32 MB", "formats": ["fp32"], "rank": 4},
    }
    flat = losses(play(tree).events)

    config = parse_run_config(copy.deepcopy(tree), "test")
    shapes = read_shapes(tiny_llama, config.lora.targets)
    sites = SimulatedFleet(config.model_dump_json())
    tree["fleet"] = {"group": {"count": 2, "memory": "1 GB", "rank": 16, "devices_max": 2}}
    above = parse_run_config(tree, "test")
    events: list[Event] = []
    with ExitStack() as stack:
        groups = []
        for first, name in ((0, "east"), (2, "west")):
            grid = stack.enter_context(InProcessGrid(make_client_app(Half(sites, first)), 2))
            folder = stack.enter_context(RunFolder.create(tmp_path / name))
            group = Group(name, "group", 2)
            groups.append(SubCoordinator(group, config, shapes, grid, folder, lambda _: None))

        def group_of(context: Context) -> SubCoordinator:
            return groups[int(context.node_config["partition-id"])]  # type: ignore[arg-type]

        folder = stack.enter_context(RunFolder.create(tmp_path / "top"))
        top = stack.enter_context(InProcessGrid(make_group_app(group_of), 2))
        Coordinator(above, shapes, folder, events.append).run(top, Counted(2))
    assert losses(events) == pytest.approx(flat, rel=2e-6)
    assert flat[-1] < flat[0]
