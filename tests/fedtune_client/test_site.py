"""Which site a Flower node is, and what it knows of itself."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune_client.site import SimulatedFleet

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages


def test_a_partition_is_the_site_of_that_place_among_the_sorted_names(desk: Desk) -> None:
    names = [desk.site(partition).profile.name for partition in range(4)]
    assert names == ["east", "north", "south", "west"]


def test_a_site_has_the_limits_of_its_class_and_the_settings_of_the_run(desk: Desk) -> None:
    site = desk.site(2)
    assert site.profile.budget_bytes == desk.config.fleet["any"].memory
    assert site.profile.formats == ("fp32", "nf4")
    assert site.model_path == desk.config.model.path
    assert site.data == desk.config.data
    assert site.shares_backbone


@pytest.mark.parametrize(("asked", "used"), [("auto", "fp32"), ("bf16", "bf16")])
def test_a_simulated_site_measures_no_dtype(desk: Desk, asked: str, used: str) -> None:
    tree = desk.config.model_dump()
    tree["train"] |= {"compute": asked, "tune_allocator": False}
    config = parse_run_config(tree, "test")
    site = SimulatedFleet(config.model_dump_json())({"partition-id": 0})
    assert (site.compute, site.tune_allocator) == (used, False)


@pytest.mark.parametrize(("clock", "measures"), [("virtual", False), ("measured", True)])
def test_a_simulated_site_measures_where_the_runs_clock_is_this_machines(
    desk: Desk, clock: str, measures: bool
) -> None:
    tree = desk.config.model_dump()
    tree["simulation"]["clock"] = clock
    config = parse_run_config(tree, "test")
    site = SimulatedFleet(config.model_dump_json())({"partition-id": 0})
    assert site.measures_steps is measures


def test_all_sites_of_a_process_share_one_reading_of_the_data(desk: Desk) -> None:
    assert desk.site(0).sites is desk.site(3).sites


def test_equal_fleets_are_equal_keys(desk: Desk) -> None:
    one, other = (SimulatedFleet(desk.config.model_dump_json()) for _ in range(2))
    assert one is not other
    assert {one: 1}[other] == 1
