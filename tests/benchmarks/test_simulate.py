"""What the benchmark of simulated fleets makes of its runs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import simulate
from simulate import ONE_BY_ONE, RAY, SIDE_BY_SIDE, Played


def played(devices: int, way: str, rate: float, peak: int = 1) -> Played:
    return Played(devices, way, rate, 1.0, peak, "same")


RUNS = [
    played(8, SIDE_BY_SIDE, 10.0),
    played(8, ONE_BY_ONE, 8.0),
    played(8, RAY, 5.0),
    played(64, SIDE_BY_SIDE, 12.0, peak=77),
    played(64, ONE_BY_ONE, 8.0),
]


def test_ray_is_compared_at_the_largest_fleet_that_it_played() -> None:
    found = simulate.figures(RUNS)
    assert found["speedup_stacked"] == 1.5
    assert found["speedup_vs_ray"] == 2.0
    assert (found["device_rounds_per_s"], found["peak_bytes"]) == (12.0, 77)


def test_the_table_compares_each_way_with_the_slowest_of_its_fleet() -> None:
    rows = simulate.rows_of(RUNS)
    assert [row["device-rounds per s"] for row in rows[:3]] == [
        "10.0 (2.00)",
        "8.0 (1.60)",
        "5.0 (1.00)",
    ]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_the_memory_of_a_process_is_seen_while_it_is_watched() -> None:
    with simulate._watched(os.getpid()) as peak:
        block = bytearray(os.urandom(1 << 20) * 64)
        time.sleep(0.5)
    assert peak.bytes > len(block)
