"""What the benchmark of slow devices makes of its runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import straggler
from straggler import ALL, FULL, QUICK, Played, modes

from fedtune.config import parse_run_config


def played(mode: str, *points: tuple[float, float], seed: int = 0) -> Played:
    times, losses = zip(*points, strict=True)
    return Played(mode, "pareto", seed, times, losses, 0.5, updates=4, late=1, refused=0)


def test_the_time_to_a_loss_is_straight_between_unequal_rounds() -> None:
    run = played(ALL, (0.0, 4.0), (10.0, 3.0), (50.0, 2.0))
    assert run.seconds_to(3.5) == 5.0
    assert run.seconds_to(2.5) == 30.0
    assert run.seconds_to(1.9) == math.inf


def test_the_target_is_a_loss_that_every_mode_of_a_seed_gets_to() -> None:
    found = [
        played(ALL, (0.0, 4.0), (20.0, 2.0)),
        played("async", (0.0, 4.0), (2.0, 3.0), (4.0, 3.5)),
        played(ALL, (0.0, 4.0), (20.0, 2.0), seed=1),
        played("async", (0.0, 4.0), (5.0, 2.0), seed=1),
    ]
    assert straggler.times_to(found, ALL, "pareto") == [10.0, 20.0]
    assert straggler.sooner(found, "async", "pareto") == [5.0, 4.0]
    assert straggler.sooner(found, ALL, "pareto") == [1.0, 1.0]


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_the_run_files_are_good(size: straggler.Size) -> None:
    for mode in modes(size):
        tree = straggler.run_tree(mode, "pareto", 0, size, Path("/shared"), planned_s=0.5)
        config = parse_run_config(tree, "straggler")
        assert config.devices == size.devices
        assert config.run.round_deadline_s == (1.0 if mode.key == "deadline" else 1e6)
