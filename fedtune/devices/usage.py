"""Memory that this process itself has taken."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def own_memory_bytes() -> int | None:
    """Private memory of this process that is resident; None where the system does not say.

    Pages of files that are mapped in, such as the base's, are left out: the system counts those as
    free, because it can drop them.
    """
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return None
