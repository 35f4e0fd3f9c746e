"""Which processor this is, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from fedtune.devices.control_groups import processor_quota


def usable_cores(root: Path = Path("/")) -> int:
    """Logical processors that this process may run on at the same time; at least 1.

    The least of those the machine has, those its affinity allows (`taskset`, `cpuset`) and the
    processor time of its control groups, rounded down: with more threads than that, all of them
    are stopped for a part of every period.

    Args:
        root: the root of the file system, for the control groups of Linux.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # neither macOS nor Windows has it
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = processor_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def processor_name(root: Path = Path("/")) -> str:
    """What the processor calls itself, as far as the system says.

    Args:
        root: the root of the file system, for `/proc/cpuinfo` of Linux.
    """
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for key in ("model name", "Model"):  # x86; Raspberry Pi
        for line in lines:
            name, separator, value = line.partition(":")
            if separator and name.strip() == key and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
