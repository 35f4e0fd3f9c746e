"""A plan is kept under a real limit, and what the benchmark makes of its lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan_accuracy
from plan_accuracy import Line

MB = 10**6


def line(predicted: float, measured: float, seconds: float, took: float) -> Line:
    return Line("plan", 100 * MB, int(predicted * MB), int(measured * MB), seconds, took)


def test_the_first_line_calibrates_the_seconds_of_the_others() -> None:
    lines = [line(100, 100, 1.0, 2.0), line(110, 100, 1.0, 2.5), line(80, 100, 3.0, 4.0)]
    found = plan_accuracy.figures(lines)
    assert found["time_error_median"] == pytest.approx((0.2 + 0.5) / 2)
    assert found["memory_error_worst"] == 0.1
    assert found["memory_delta_error_worst"] == 0.2
    assert found["memory_error_median"] == 0.05


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_a_round_finishes_within_its_plans_bytes_and_not_within_six_tenths(
    tmp_path: Path,
) -> None:
    rows = plan_accuracy.under_a_limit(tmp_path)
    assert [row["it"] for row in rows] == ["finishes", "runs out of memory"]
