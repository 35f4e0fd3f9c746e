"""How much memory this process may still take: the least of what every limit leaves.

It changes from second to second, so nobody keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from fedtune.devices.control_groups import memory_limits
from fedtune.devices.usage import status_bytes

try:
    import resource
except ImportError:  # there is none on Windows, and no such limits either
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """What this process may still take.

    Attributes:
        limit: what leaves the least: `machine`, `control group`, `ulimit -v` or `ulimit -d`.
        total_bytes: memory of the machine.
    """

    free_bytes: int
    limit: str
    total_bytes: int


def free_memory(root: Path = Path("/")) -> FreeMemory:
    """Memory that this process may still take, of what is really free.

    The machine's part is what the kernel says can be had without swapping: MemAvailable on Linux
    (file cache counts as free as far as it can be dropped), and the like on macOS and Windows.

    Args:
        root: the root of the file system, for the limits of Linux.
    """
    machine = psutil.virtual_memory()
    left = {"machine": int(machine.available), **_own_limits()}
    groups = [limit.free_bytes for limit in memory_limits(root)]
    if groups:
        left["control group"] = min(groups)
    limit = min(left, key=left.__getitem__)
    return FreeMemory(left[limit], limit, int(machine.total))


def _own_limits() -> dict[str, int]:
    """What the limits of this process leave, where it has any.

    Only Linux is asked how much it holds by each limit's own count; macOS does not enforce them.
    """
    if resource is None:
        return {}
    left = {}
    for name, kind, size in (
        ("ulimit -v", resource.RLIMIT_AS, "VmSize"),
        ("ulimit -d", resource.RLIMIT_DATA, "VmData"),
    ):
        soft, _ = resource.getrlimit(kind)
        held = status_bytes(size)
        if soft != resource.RLIM_INFINITY and held is not None:
            left[name] = max(0, soft - held)
    return left
