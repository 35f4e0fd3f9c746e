"""Memory of the machine that is free for training."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """What this process may still take; without limit where the system does not say."""

    free_bytes: int


def free_memory() -> FreeMemory:
    """Host memory that this process can still take."""
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return FreeMemory(1024 * int(line.split()[1]))
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return FreeMemory(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return FreeMemory(sys.maxsize)
