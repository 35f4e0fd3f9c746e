"""The step benchmarks run from end to end, on models that are as small as can be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run(script: str, *options: str) -> str:
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_the_quick_step_benchmark_gives_its_figures_and_the_same_loss() -> None:
    found = json.loads(run("train_step.py", "--quick", "--smoke", "--json").splitlines()[-1])
    assert set(found) == {
        "speedup_ragged",
        "speedup_small",
        "speedup_dense",
        "memory_ratio",
        "loss_gap",
    }
    assert found["loss_gap"] < 1e-4
    assert found["memory_ratio"] < 0.5


@pytest.mark.soak
def test_large_fleets_are_planned_in_time() -> None:
    found = json.loads(run("plan_scale.py", "--quick", "--json").splitlines()[-1])
    assert found["seconds_7b_100"] < 30
    assert found["seconds_7b_10000"] < 60
    assert found["milp_programs"] > 0
    assert found["milp_gain"] > 0


@pytest.mark.soak
def test_three_bits_both_ways_take_a_ninth_of_the_bytes() -> None:
    found = json.loads(run("bytes.py", "--quick", "--json").splitlines()[-1])
    assert found["bytes_ratio"] > 8.5
    assert abs(found["loss_gap"]) < 0.02
    assert found["q2/q2: bytes_ratio"] > 12
    assert 1.9 < found["fp16/fp16: bytes_ratio"] < 2.0


@pytest.mark.parametrize("contender", ["fedtune/", "graph/", "bitsandbytes/"])
def test_the_gpu_benchmark_runs_on_a_cpu(contender: str) -> None:
    lines = run("gpu.py", "--smoke", "--only", contender).splitlines()
    cells = [json.loads(line) for line in lines if line.startswith("{")]
    assert cells
    assert all(cell["problem"] == "" and cell["tokens_per_s"] > 0 for cell in cells)
    # The models are the same, so all contenders start from one loss but for bf16 and block scales.
    dense = [cell["first_loss"] for cell in cells if cell["workload"] == "64"]
    assert dense == pytest.approx([5.71], abs=0.03)


def test_the_load_of_a_coordinator_is_told_by_fleet() -> None:
    options = ("--quick", "--only", "coordinator", "--json")
    found = json.loads(run("load.py", *options).splitlines()[-1])
    few, many = found["4 devices"], found["12 devices"]
    assert many["upload_mb"] == pytest.approx(3 * few["upload_mb"], rel=0.05)
    assert few["cpu_s"] > 0
    assert many["devices_cpu_s"] > few["devices_cpu_s"] > 0


@pytest.mark.deployment
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.soak
def test_light_devices_play_a_round_at_a_real_link() -> None:
    options = ("--quick", "--only", "link", "--devices", "3", "--json")
    found = json.loads(run("load.py", *options).splitlines()[-1])["3 devices at a link"]
    assert found["reported"] == 3
    assert found["cpu_s"]["link"] > 0
    # Each device asks for its run, three messages and their parts, and answers each.
    assert found["requests"] > 3 * (3 * 10)
    assert found["peak_mb"]["run"] > found["peak_mb"]["runner"] > 0


@pytest.mark.deployment
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.soak
def test_an_adapter_goes_to_three_sites_and_back() -> None:
    found = json.loads(run("adapter.py", "--quick", "--json").splitlines()[-1])["packed"]
    assert found["megabytes"] == pytest.approx(10.0, abs=0.1)
    assert set(found["cpu_s"]) == {"link", "run", "node", "executor"}
    assert all(value > 0 for value in found["peak_mb"].values())
