"""Which site sits on which class of device."""

from __future__ import annotations

from collections import Counter

import pytest

from fedtune.catalogue import CATALOGUE
from fedtune.devices.simulated import profile_of_class, simulated_profiles
from fedtune.errors import ConfigError
from fedtune.settings import DeviceClassSection

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


def _with_sites(**sites: tuple[str, ...]) -> dict[str, DeviceClassSection]:
    return {n: s.model_copy(update={"sites": sites.get(n, ())}) for n, s in FLEET.items()}


def test_a_named_site_sits_on_its_class_under_every_seed() -> None:
    fleet = _with_sites(large=("c",))
    for seed in range(10):
        profiles = simulated_profiles(fleet, SITES, seed)
        assert profiles["c"].device_class == "large"
        assert Counter(p.device_class for p in profiles.values()) == {"small": 3, "large": 2}


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ({"large": ("a", "b", "c")}, r"fleet\.large\.sites names 3 sites, but .*count is 2"),
        ({"large": ("z",)}, r"fleet\.large\.sites: there is no site 'z'; sites: a, b, c, d, e"),
        ({"small": ("a",), "large": ("a",)}, "'a' is already in fleet.small.sites"),
    ],
)
def test_sites_that_cannot_be_placed_are_refused(
    sites: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        simulated_profiles(_with_sites(**sites), SITES, seed=0)


def _of_catalogue(**values: object) -> DeviceClassSection:
    return DeviceClassSection.model_validate({"count": 1, **values})


def test_a_device_of_the_catalogue_reports_what_it_would_compute_in() -> None:
    profile = profile_of_class("a", "card", _of_catalogue(device="gpu-8gb"))
    device = CATALOGUE["gpu-8gb"]
    assert profile.compute == "bf16"
    assert profile.matmul_flops_per_s == pytest.approx(device.flops_per_s)
    assert profile.budget_bytes == device.budget_bytes
    assert profile.cpu_threads == device.cpu_threads
    assert profile.device_class == "card"


def test_the_rate_of_a_section_moves_all_dtypes_alike() -> None:
    device = CATALOGUE["gpu-8gb"]
    section = _of_catalogue(device="gpu-8gb", flops_per_s=device.flops_per_s["bf16"] / 10)
    rates = profile_of_class("a", "card", section).matmul_flops_per_s
    assert rates == pytest.approx({name: rate / 10 for name, rate in device.flops_per_s.items()})


def test_a_class_of_ones_own_computes_as_a_simulation_does() -> None:
    profile = profile_of_class("a", "small", FLEET["small"])
    assert profile.compute == "fp32"
    assert profile.matmul_flops_per_s == {"fp32": FLEET["small"].flops_per_s}
