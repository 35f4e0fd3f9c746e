"""The run that real sites play in tests, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

SITES = ("east", "north", "south")
ROUND_S = 90.0
"""Longest that a round may take on a machine that does other work, too."""


def deployed(expected: tuple[Path, Mapping[str, Any]], name: str, **run: object) -> dict[str, Any]:
    """The simulated run's settings for real sites, with its plan."""
    simulated, tree = expected
    return {
        **{key: value for key, value in tree.items() if key not in ("outputs", "simulation")},
        "run": {**tree["run"], "name": name, **run},
        "data": {"max_tokens": 40},
        "plan": {"file": str(simulated / "plan.json")},
        "outputs": {"exports": []},
    }


def result(folder: Path) -> bytes:
    """The adapter that a run ended with, as bytes."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    adapter = read_checkpoint(newest).adapter
    return b"".join(
        array.tobytes()
        for _, matrix in sorted(adapter.matrices.items())
        for array in (matrix.u, matrix.sigma, matrix.v)
    )
