"""The devices of a simulated fleet: which site sits on which class of device.

A simulated device reports what its class says, not what this machine can do; its memory budget is
what the planner keeps it to.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.catalogue import CATALOGUE
from fedtune.errors import ConfigError
from fedtune.records import ComputeName, DeviceProfile
from fedtune.settings import DeviceClassSection


def simulated_profiles(
    fleet: Mapping[str, DeviceClassSection],
    sites: Sequence[str],
    seed: int,
    accelerator: str = "cpu",
) -> dict[str, DeviceProfile]:
    """A profile for every site: the named ones as the fleet says, the rest dealt out by the seed.

    Args:
        fleet: class name -> its limits and how many devices have it.
        sites: as many names as the fleet has devices.
        accelerator: what this machine computes all of them on.

    Raises:
        ConfigError: a class names a site that does not exist, or more sites than it has devices.
    """
    named = _named_sites(fleet, sites)
    free = [
        name for name, section in fleet.items() for _ in range(section.count - len(section.sites))
    ]
    order = np.random.default_rng([seed, 3]).permutation(len(free))
    drawn = [site for site in sorted(sites) if site not in named]
    classes = named | {site: free[index] for site, index in zip(drawn, order, strict=True)}
    return {
        site: profile_of_class(site, classes[site], fleet[classes[site]], accelerator)
        for site in sorted(sites)
    }


def _named_sites(fleet: Mapping[str, DeviceClassSection], sites: Sequence[str]) -> dict[str, str]:
    """Site -> the class whose section names it."""
    named: dict[str, str] = {}
    for class_name, section in fleet.items():
        if len(section.sites) > section.count:
            raise ConfigError(
                f"fleet.{class_name}.sites names {len(section.sites)} sites, but "
                f"fleet.{class_name}.count is {section.count}"
            )
        for site in section.sites:
            if site not in sites:
                near = difflib.get_close_matches(site, sites, n=1)
                known = f"sites: {', '.join(sorted(sites))}"
                hint = f"did you mean {near[0]!r}?" if near else known
                raise ConfigError(f"fleet.{class_name}.sites: there is no site {site!r}; {hint}")
            if site in named:
                raise ConfigError(
                    f"fleet.{class_name}.sites: {site!r} is already in fleet.{named[site]}.sites"
                )
            named[site] = class_name
    return named


def profile_of_class(
    site: str, class_name: str, section: DeviceClassSection, accelerator: str = "cpu"
) -> DeviceProfile:
    """What a device of that class reports.

    A device of the catalogue has a rate for each dtype; `flops_per_s` of the section, which is that
    of the dtype it computes in, moves all of them alike.
    """
    device = CATALOGUE.get(section.device)
    rates = {"fp32": section.flops_per_s}
    compute: ComputeName = "fp32"
    if device is not None:
        compute = device.compute
        scale = section.flops_per_s / device.flops_per_s[compute]
        rates = {dtype: rate * scale for dtype, rate in device.flops_per_s.items()}
    return DeviceProfile(
        name=site,
        device_class=class_name,
        cpu_threads=1 if device is None else device.cpu_threads,
        memory_bytes=section.memory,
        accelerator=accelerator,
        accelerator_memory_bytes=0 if accelerator == "cpu" else section.memory,
        matmul_flops_per_s=rates,
        memory_bandwidth_bytes_per_s=float(section.memory_bandwidth),
        link_bytes_per_s=float(section.link),
        formats=section.formats,
        compute=compute,
    )
