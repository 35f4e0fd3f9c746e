"""Runs of a fake fleet whose devices come and go, as a deployment plays them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune.records import Event, GlobalAdapter
from fedtune.wire.checkpoint import latest_checkpoint
from fedtune_server import presence
from fedtune_server.coordinator import Coordinator
from fedtune_server.roster import Registered
from fedtune_server.run_folder import RunFolder
from fedtune_server.saved_state import find_state
from tests.fedtune_server.live_grid import Directory, LiveGrid

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
Tree = dict[str, dict[str, Any]]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and wait little."""
    monkeypatch.setattr(presence.Presence.__init__, "__defaults__", (0.02,))
    for told in (presence.Live, presence.Again):
        monkeypatch.setattr(told.__init__, "__defaults__", (1.0,))


class Runs:
    """Plays a run of a fake fleet whose devices come and go."""

    def __init__(self, fleet_of: FleetOf, folder: Path) -> None:
        self.fake = fleet_of("a", "b", "c")
        self.folder = folder / "run"
        self.tree: Tree = {
            "run": {"name": "unit", "rounds": 3, "round_deadline_s": 30.0},
            "model": {"path": "not/read/here"},
            "data": {"max_tokens": 16},
            "lora": {"rank_max": 3, "rank_cap": 6},
            "train": {"batch_size": 4, "local_steps": 3},
            "importance": {"method": "uniform"},
            "deployment": {"sites": ["*"]},
        }
        self.watch: Callable[[Event], None] = lambda event: None
        self.needed, self.patience_s, self.grace_s = 2, 5.0, 0.1

    def play(self, grid: LiveGrid) -> GlobalAdapter:
        config = parse_run_config(self.tree, "test")
        directory = Directory(grid.names)
        roster = Registered(
            ("*",), directory.sites, directory.name_of_node, self.needed, 1,
            self.patience_s, self.grace_s,
        )  # fmt: skip
        shapes = self.fake.shapes

        def emit(event: Event) -> None:
            self.fake.events.append(event)
            self.watch(event)

        with RunFolder.enter(self.folder, config) as folder:
            saved = find_state(folder.checkpoints, shapes.digest, folder.run)
            coordinator = Coordinator(config, shapes, folder, emit, saved=saved)
            return coordinator.run(grid, roster)

    def asked(self) -> list[tuple[int, str]]:
        return [(order.round, order.plan.device) for order in self.fake.orders]

    def checkpoint(self) -> bytes:
        path = latest_checkpoint(self.folder / "checkpoints")
        assert path is not None
        return path.read_bytes()
