"""How much memory this process holds, as the operating system counts it (Linux; elsewhere unknown).

Resident memory counts private pages and the pages of mapped files that were touched, a base's
weights among them.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def own_memory_bytes() -> int | None:
    """Private memory of this process that is resident; None where the system does not say.

    Pages of files that are mapped in, such as the base's, are left out: the system counts those as
    free, because it can drop them.
    """
    return status_bytes("RssAnon")


def resident_bytes() -> int | None:
    """What the process holds now; None where that is not told."""
    return status_bytes("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that it held since its start, or since `restart_peak`."""
    return status_bytes("VmHWM")


def restart_peak() -> bool:
    """Let the peak start from what is held now; False where the system does not allow it.

    Source: proc(5): the kernel takes a 5 written to clear_refs as just that.
    """
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def status_bytes(name: str) -> int | None:
    """A size of this process by its name in proc_pid_status(5); None where it is not told."""
    try:
        # Other fields, such as the program's name, may hold anything.
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
