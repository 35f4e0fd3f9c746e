"""What this machine is, measured where it has to be and kept where it may be.

This module does not import torch: whoever has it hands in a `Measurer`
(`fedtune.train.measure_device`). Without one there are memory, cores and the link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fedtune.devices.link import link_bytes_per_s
from fedtune.devices.measurement import Measurement, fingerprint, keep, kept, package_versions
from fedtune.devices.memory import FreeMemory, free_memory
from fedtune.devices.processor import processor_name, usable_cores
from fedtune.errors import MissingExtraError, ModelError
from fedtune.records import DeviceProfile

Report = Callable[[str], None]
"""Told of each step before it begins."""

MEMORY_SHARE: Final = 0.9
"""Of the free memory, what a plan may count on: other programs take some between the profile and
the round. Chosen."""


class Measurer(Protocol):
    """Measures what only torch can say of a machine."""

    def facts(self) -> Mapping[str, str]:
        """What a kept measurement depends on, beside the machine and the versions."""
        ...

    def measure(self, report: Report) -> Measurement:
        """Measure; some seconds."""
        ...

    def free_accelerator_bytes(self) -> int:
        """Free memory of the GPU at this moment; 0 without one."""
        ...


@dataclass(frozen=True, slots=True)
class Probe:
    """What this machine is.

    Attributes:
        accelerator_free_bytes: of the GPU's memory; 0 without one.
        link_bytes_per_s: 0: not measured.
        measurement: None without torch.
        from_cache: whether `measurement` is an earlier process's.
    """

    processor: str
    cores: int
    memory: FreeMemory
    versions: Mapping[str, str]
    measurement: Measurement | None = None
    accelerator_free_bytes: int = 0
    link_bytes_per_s: float = 0.0
    from_cache: bool = False


def probe(
    measurer: Measurer | None,
    cache: Path | None,
    *,
    fresh: bool = False,
    link_url: str = "",
    report: Report = lambda step: None,
) -> Probe:
    """Find out what this machine is.

    Args:
        measurer: None: leave out what needs torch.
        cache: folder of kept measurements; None: neither read nor written.
        fresh: measure, whatever is kept.
        link_url: a file on the coordinator's machine to measure the link with; empty: do not.

    Raises:
        ConfigError: the link cannot be measured.
    """
    # First, because it is what most often fails.
    if link_url:
        report("reading from the coordinator")
    link = link_bytes_per_s(link_url) if link_url else 0.0
    measurement, from_cache, accelerator_free = None, False, 0
    if measurer is not None:
        measurement, from_cache = _measured(measurer, cache, fresh, report)
        accelerator_free = measurer.free_accelerator_bytes()
    return Probe(
        processor=processor_name(),
        cores=usable_cores(),
        memory=free_memory(),
        versions=package_versions(),
        measurement=measurement,
        accelerator_free_bytes=accelerator_free,
        link_bytes_per_s=link,
        from_cache=from_cache,
    )


def _measured(
    measurer: Measurer, cache: Path | None, fresh: bool, report: Report
) -> tuple[Measurement, bool]:
    if cache is None:
        return measurer.measure(report), False
    name = fingerprint(measurer.facts(), free_memory().total_bytes)
    found = None if fresh else kept(cache, name)
    if found is not None:
        return found, True
    measurement = measurer.measure(report)
    keep(cache, name, measurement)
    return measurement, False


def profile_of(
    found: Probe,
    name: str,
    device_class: str = "probed",
    memory_bytes: int = 0,
    link_bytes_per_s: float = 0.0,
) -> DeviceProfile:
    """The profile of a probed machine, as a site reports it before the first round.

    Args:
        name: the site's own name.
        device_class: machines of one class and of equal figures share a plan.
        memory_bytes: what the site allows a training process at most, on the GPU where there is
            one; 0: nine tenths of what is free.
        link_bytes_per_s: what the site knows of its line; 0: what was measured, if it was.

    Raises:
        MissingExtraError: the machine was probed without torch, so it cannot train.
        ModelError: no backbone format runs on it.
    """
    measured = found.measurement
    if measured is None:
        raise MissingExtraError("torch", "train", "a device that trains")
    if not measured.formats:
        raise ModelError(
            "no backbone format runs on this machine, so it cannot train; of fp32 it says: "
            f"{measured.failed_formats.get('fp32', 'not tried')}"
        )
    on_gpu = measured.accelerator != "cpu"
    host = max(1, int(found.memory.free_bytes * MEMORY_SHARE))
    own = int(found.accelerator_free_bytes * MEMORY_SHARE)
    if memory_bytes:
        host, own = (host, min(own, memory_bytes)) if on_gpu else (min(host, memory_bytes), own)
    return DeviceProfile(
        name=name,
        device_class=device_class,
        cpu_threads=found.cores,
        memory_bytes=host,
        accelerator=measured.accelerator,
        accelerator_memory_bytes=own,
        matmul_flops_per_s=dict(measured.matmul_flops_per_s),
        memory_bandwidth_bytes_per_s=measured.memory_bandwidth_bytes_per_s,
        link_bytes_per_s=link_bytes_per_s or found.link_bytes_per_s,
        formats=measured.formats,
        versions=dict(found.versions),
        compute=measured.compute,
    )
