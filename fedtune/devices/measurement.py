"""What was measured of a machine, and where it is kept until the machine changes.

A measurement is kept under a fingerprint of the hardware and of the libraries that were measured
with. Free memory is no part of it: it is asked for every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from fedtune.devices.processor import processor_name, usable_cores
from fedtune.records import BACKBONE_FORMATS, ComputeName, FormatName

_SCHEMA: Final = 1
"""Raise it when what is measured changes its meaning; older files are measured anew."""
_PACKAGES: Final = ("fedtune", "flwr", "numpy", "torch", "transformers", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class Measurement:
    """How fast a machine is, and what runs on it.

    Attributes:
        accelerator: `cpu` or `cuda`: where a training process computes.
        accelerator_name: of the GPU; empty on a CPU.
        capability: compute capability of the GPU, such as `9.0`; empty on a CPU.
        accelerator_total_bytes: memory of the GPU; 0 on a CPU.
        threads: that products were measured with.
        matmul_flops_per_s: by dtype; without those that do not run.
        compute: the dtype that `train.compute = "auto"` picks here.
        formats: backbone formats that were tried and gave the right product and gradient.
        failed_formats: those that did not, and why.
        kernels: which path the kernels take here.
        measured: day, as 2026-11-27.
    """

    accelerator: str
    threads: int
    matmul_flops_per_s: Mapping[str, float]
    memory_bandwidth_bytes_per_s: float
    compute: ComputeName
    formats: tuple[FormatName, ...]
    failed_formats: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""
    accelerator_name: str = ""
    capability: str = ""
    accelerator_total_bytes: int = 0
    measured: str = ""


def package_versions() -> dict[str, str]:
    """Package -> version, of those installed that a plan's figures may depend on; and Python's."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(facts: Mapping[str, str], total_bytes: int) -> str:
    """A name for this machine with these libraries; another machine or version has another.

    Args:
        facts: what only the measuring side knows, such as the GPU's name and the threads.
        total_bytes: memory of the machine, which counts in whole GB: kernels differ in how much
            they keep for themselves.
    """
    known = {
        "schema": str(_SCHEMA),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": str(usable_cores()),
        "memory": f"{total_bytes / 1e9:.0f} GB",
        **{f"package {name}": number for name, number in package_versions().items()},
        **{f"measured {name}": value for name, value in facts.items()},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]


def kept(folder: Path, name: str) -> Measurement | None:
    """The measurement under a fingerprint; None where there is none that can be read."""
    try:
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        measurement = Measurement(**{**tree, "formats": tuple(tree["formats"])})
    except (OSError, ValueError, TypeError, KeyError):
        # A file of a killed process, or of another version: it is measured anew and replaced.
        return None
    return measurement if set(measurement.formats) <= set(BACKBONE_FORMATS) else None


def keep(folder: Path, name: str, measurement: Measurement) -> None:
    """Keep a measurement for the next process; does nothing where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".partial")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(measurement), file, indent=1)
        os.replace(partial, folder / f"{name}.json")
    except OSError:
        # A read-only home: the next process measures again.
        return
