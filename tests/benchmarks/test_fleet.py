"""What the benchmark of an unequal fleet makes of its runs."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fleet
from fleet import FEDTUNE, METHODS, Played

from fedtune.config import parse_run_config


def played(key: str, *losses: float, seconds: float = 10.0, rate: float = 1e-2) -> Played:
    steps = dict.fromkeys(fleet.APART, 10)
    return Played(key, rate, 0, seconds, losses, steps, took_s=1.0)


def test_the_time_to_a_loss_is_straight_between_rounds() -> None:
    run = played("fedit", 4.0, 3.0, 2.0)
    assert run.seconds_to(3.5) == 5.0
    assert run.seconds_to(2.0) == 20.0
    assert run.seconds_to(1.9) == math.inf


def test_a_loss_counts_when_it_is_first_as_low_even_if_it_rises_again() -> None:
    assert played("fedit", 4.0, 2.0, 3.0, 2.0).seconds_to(2.5) == 7.5


def test_a_run_that_is_measured_every_few_rounds_counts_all_of_them() -> None:
    assert replace(played("fedit", 4.0, 2.0), every=8).seconds_to(3.0) == 40.0


def test_a_rival_is_measured_where_it_is_best_and_not_where_it_stops() -> None:
    rival = played("fedit", 4.0, 2.0, 3.0)
    ours = played(FEDTUNE, 4.0, 2.8, 2.0, seconds=2.0)
    assert fleet.speedup(rival, ours) == 2.5


def test_a_loss_that_is_never_reached_is_no_speedup() -> None:
    assert fleet.speedup(played("fedit", 4.0, 2.0), played(FEDTUNE, 4.0, 2.1)) == 0.0


def test_every_method_is_tuned_for_the_lowest_loss() -> None:
    for key in ("hetlora", FEDTUNE):
        tried = [played(key, 4.0, 2.9, 2.8, rate=3e-2), played(key, 4.0, 3.1, 2.0)]
        assert fleet.best_rate(tried) == 1e-2


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_the_run_files_are_good_and_the_classes_ten_times_apart(method: fleet.Method) -> None:
    tree = fleet.run_tree(method, 1e-2, 0, fleet.FULL, Path("/shared"), 10**6)
    config = parse_run_config(tree, "fleet")
    for weaker, stronger in (("weak", "middle"), ("middle", "strong")):
        for key in ("memory", "flops_per_s", "memory_bandwidth", "link"):
            low, high = getattr(config.fleet[weaker], key), getattr(config.fleet[stronger], key)
            assert high == 10 * low
    rivals_steps = "planned" if method.key == FEDTUNE else "equal"
    assert config.plan.steps == rivals_steps


def test_the_weakest_has_memory_for_its_rank_and_not_for_one_more(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = fleet.smallest_memory(shared_folder, fleet.QUICK)
    method = fleet.METHODS[0]
    ranks = dict.fromkeys(fleet.APART, fleet.CARRIED_RANK + 1)
    larger = replace(method, ranks=ranks, run=fleet.padded(fleet.CARRIED_RANK + 1))
    monkeypatch.setattr(fleet, "METHODS", (larger,))
    assert fleet.smallest_memory(shared_folder, fleet.QUICK) > 1.02 * carried


def test_a_seed_that_is_lost_is_told_before_the_median() -> None:
    found = {
        "fedit": [played("fedit", 4.0, 2.0), played("fedit", 4.0, 2.0)],
        FEDTUNE: [played(FEDTUNE, 4.0, 2.1), played(FEDTUNE, 4.0, 1.9)],
    }
    assert fleet.plainly(found).startswith("On 1 of 2 seeds")
    assert fleet.plainly({key: runs[1:] for key, runs in found.items()}).startswith("The median")
