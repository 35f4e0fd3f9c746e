"""Which site sits on which class of device."""

from __future__ import annotations

from collections import Counter

from fedtune.config import DeviceClassSection
from fedtune.devices.simulated import simulated_profiles

FLEET = {
    "small": DeviceClassSection(count=3, memory=1000, formats=("nf4",)),
    "large": DeviceClassSection(count=2, memory=9000),
}
SITES = ["a", "b", "c", "d", "e"]


def test_each_class_gets_as_many_sites_as_it_has_devices() -> None:
    profiles = simulated_profiles(FLEET, SITES, seed=0)
    assert list(profiles) == SITES
    assert Counter(p.device_class for p in profiles.values()) == {"small": 3, "large": 2}


def test_the_seed_alone_decides_who_gets_what() -> None:
    deals = {
        tuple(p.device_class for p in simulated_profiles(FLEET, SITES, seed=s).values())
        for s in range(20)
    }
    assert len(deals) > 3
    assert simulated_profiles(FLEET, SITES, 4) == simulated_profiles(FLEET, SITES[::-1], 4)


def test_a_profile_reports_its_class_and_not_this_machine() -> None:
    profiles = simulated_profiles(FLEET, SITES, seed=0)
    small = next(p for p in profiles.values() if p.device_class == "small")
    assert small.budget_bytes == 1000
    assert small.formats == ("nf4",)


def test_on_an_accelerator_the_budget_is_that_of_the_class() -> None:
    profiles = simulated_profiles(FLEET, SITES, seed=0, accelerator="cuda")
    budgets = {p.device_class: p.budget_bytes for p in profiles.values()}
    assert budgets == {"small": 1000, "large": 9000}
