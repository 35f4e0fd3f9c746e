"""The benchmark of joining runs, and what it joins is what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from joins.cases import RANKS, fleet_of, layers_of_7b, state_of
from joins.routes import SIZES, timed

from fedtune.aggregate.delta import Delta

ROOT = Path(__file__).resolve().parents[2]


def test_the_small_benchmark_gives_its_figures() -> None:
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "aggregate.py")]
    command += ["--quick", "--smoke", "--json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert set(found) == {"speedup_vs_flexlora", "relative_error", "peak_ratio"}
    assert found["relative_error"] < 1e-6
    assert found["speedup_vs_flexlora"] > 0


def test_a_fleet_of_files_is_joined_and_holds_one_dispatch_a_rank(tmp_path: Path) -> None:
    shapes = layers_of_7b(1, 64)
    adapter, rule = state_of(shapes, 16), Delta(64, workers=2)
    fleet = fleet_of(tmp_path, rule, adapter, shapes, 12)
    assert len({id(sent) for sent in fleet.sent}) == len(set(RANKS))
    assert fleet.module_bytes() == 4 * (sum(RANKS) + sum(RANKS[:2])) * (172 + 64)
    with fleet.opened() as contributions:
        joined = rule.join(adapter, contributions)
        name = "layers.0.q"
        expected = adapter.matrices[name].product()
        for each in contributions:
            change = each.update.factors[name].product() - each.sent.trained[name].product()
            expected += change / 12
    found = joined.matrices[name].product()
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", SIZES[:3])
def test_the_table_holds_every_route_of_a_small_size(size: tuple[int, int, int, int]) -> None:
    found = timed(size)
    assert set(found.seconds) == set(found.modelled) >= {"factored", "multiplied", "gram"}
    assert found.loss >= 1.0


def test_there_are_twenty_sizes() -> None:
    assert len(set(SIZES)) == 20
