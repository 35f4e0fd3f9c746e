"""The ServerApp hands its grid to the job, and lets the job's exceptions out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.errors import RoundError
from fedtune_server.app import make_server_app
from fedtune_server.simulation.grid import run_inprocess


def test_the_job_gets_the_grid_once() -> None:
    seen: list[Any] = []
    run_inprocess(make_server_app(lambda grid: seen.append(grid.get_node_ids())), ClientApp(), 2)
    assert seen == [[1000, 1001]]


def test_what_the_job_raises_ends_the_run() -> None:
    def fail(grid: Grid) -> None:
        raise RoundError("round 1 needs updates")

    job: Callable[[Grid], None] = fail
    with pytest.raises(RoundError, match="round 1 needs updates"):
        run_inprocess(make_server_app(job), ClientApp(), 1)
