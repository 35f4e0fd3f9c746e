"""A run on a tiny model and data that need nothing beside the repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.records import Event

Tree = dict[str, dict[str, object]]


@pytest.fixture
def tree(tiny_llama: Path, colour_rows: Path, tmp_path: Path) -> Tree:
    """A run of four sites on three classes of devices; a test changes what it wants."""
    return {
        "run": {"name": "flow", "rounds": 2},
        "model": {"path": str(tiny_llama)},
        "data": {
            "train": str(colour_rows),
            "max_tokens": 40,
            "partition": {"by": "field", "field": "client"},
        },
        "fleet": {
            "server": {"count": 1, "memory": "32 MB", "formats": ["fp32"]},
            "laptop": {"count": 2, "memory": "1.5 MB", "formats": ["int8"], "rank_max": 4},
            "board": {"count": 1, "memory": "700 kB", "formats": ["nf4"], "upload": "8 kB"},
        },
        "lora": {"rank_max": 8, "rank_cap": 16},
        "train": {"local_steps": 2, "batch_size": 8, "learning_rate": 1e-2},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(tmp_path / "run"), "exports": []},
    }


class Played:
    """A finished run: its folder and its events."""

    def __init__(self, folder: Path, events: list[Event]) -> None:
        self.folder, self.events = folder, events

    def all(self, kind: str) -> list[Mapping[str, object]]:
        return [event.fields for event in self.events if event.kind == kind]

    def one(self, kind: str) -> Mapping[str, object]:
        (fields,) = self.all(kind)
        return fields


@pytest.fixture
def play() -> Callable[[Tree], Played]:
    """Simulate a tree of settings and keep what happened."""

    def run(tree: Tree) -> Played:
        events: list[Event] = []
        folder = simulate_config(parse_run_config(tree, "test"), watch=events.append)
        return Played(folder, events)

    return run
