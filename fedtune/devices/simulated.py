"""The devices of a simulated fleet: which site sits on which class of device.

A simulated device reports what its class says, not what this machine can do; its memory budget is
what the planner keeps it to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.config import DeviceClassSection
from fedtune.records import DeviceProfile


def simulated_profiles(
    fleet: Mapping[str, DeviceClassSection],
    sites: Sequence[str],
    seed: int,
    accelerator: str = "cpu",
) -> dict[str, DeviceProfile]:
    """A profile for every site, classes dealt out at random but the same for the same seed.

    Args:
        fleet: class name -> its limits and how many devices have it.
        sites: as many names as the fleet has devices.
        accelerator: what this machine computes all of them on.
    """
    names = [name for name, section in fleet.items() for _ in range(section.count)]
    order = np.random.default_rng([seed, 3]).permutation(len(names))
    return {
        site: profile_of_class(site, names[index], fleet[names[index]], accelerator)
        for site, index in zip(sorted(sites), order, strict=True)
    }


def profile_of_class(
    site: str, class_name: str, section: DeviceClassSection, accelerator: str = "cpu"
) -> DeviceProfile:
    """What a device of that class reports."""
    return DeviceProfile(
        name=site,
        device_class=class_name,
        cpu_threads=1,
        memory_bytes=section.memory,
        accelerator=accelerator,
        accelerator_memory_bytes=0 if accelerator == "cpu" else section.memory,
        matmul_flops_per_s={"fp32": section.flops_per_s},
        memory_bandwidth_bytes_per_s=float(section.memory_bandwidth),
        link_bytes_per_s=float(section.link),
        formats=section.formats,
    )
