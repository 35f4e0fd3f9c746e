"""What the processes of a deployment use: seconds of processor and peak memory, by role.

    with Usage(started.tree) as usage:
        ...
    usage.cpu_s("link", begin, end)

Read from /proc of Linux twice a second. The peak of a process is the kernel's own (`VmHWM`), which
also counts what it maps of files: SQLite maps up to 256 MB of its database.
"""

from __future__ import annotations

import os
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

EVERY_S = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")
_ROLES = {
    "fedtune_server.link": "link",
    "fedtune_server.runner": "runner",
    "fedtune_server.desk": "desk",
    "fedtune_client.node": "node",
    "fedtune_client.executor": "executor",
    "light_devices.nodes": "devices",
}


@dataclass(slots=True)
class _Process:
    """What is known of one process.

    Attributes:
        seconds: (time since 1970, seconds of processor until then), ascending.
    """

    role: str
    seconds: list[tuple[float, float]] = field(default_factory=list)
    peak_bytes: int = 0
    anonymous_bytes: int = 0

    def between(self, begin: float, end: float) -> float:
        return self._at(end) - self._at(begin)

    def _at(self, moment: float) -> float:
        """Seconds until a moment, straight between two looks."""
        here = bisect_left(self.seconds, (moment, 0.0))
        if here == 0:
            return self.seconds[0][1] if self.seconds else 0.0
        if here == len(self.seconds):
            return self.seconds[-1][1]
        (t0, s0), (t1, s1) = self.seconds[here - 1], self.seconds[here]
        return s0 + (s1 - s0) * (moment - t0) / max(t1 - t0, 1e-9)


class Usage:
    """Looks at processes until it is left.

    Args:
        processes: gives those that live now; asked twice a second.
    """

    def __init__(self, processes: Callable[[], Iterable[psutil.Process]]) -> None:
        self._processes = processes
        self._known: dict[int, _Process] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def roles(self) -> list[str]:
        """Those that were seen."""
        return sorted({process.role for process in self._known.values()} - {""})

    def cpu_s(self, role: str, begin: float, end: float) -> float:
        """Seconds of processor that a role took between two moments (seconds since 1970)."""
        return sum(p.between(begin, end) for p in self._known.values() if p.role == role)

    def peak_mb(self, role: str) -> float:
        """Highest resident memory of the largest process of a role, in MB."""
        peaks = [p.peak_bytes for p in self._known.values() if p.role == role]
        return max(peaks, default=0) / 1e6

    def anonymous_mb(self, role: str) -> float:
        """The same without what is mapped from files, as far as looks twice a second see it."""
        peaks = [p.anonymous_bytes for p in self._known.values() if p.role == role]
        return max(peaks, default=0) / 1e6

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            for process in list(self._processes()):
                with suppress(psutil.Error):
                    if not self._known.get(process.pid, _Process("")).role:
                        self._known[process.pid] = _Process(_role(process.cmdline()))
            for pid, known in self._known.items():
                if known.role:
                    _look(pid, known)


def _role(command: list[str]) -> str:
    if "--task" in command:
        return "run"
    return next((role for module, role in _ROLES.items() if module in command), "")


def _look(pid: int, known: _Process) -> None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    anonymous = re.search(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)
    if peak is None or anonymous is None:  # it is ending
        return
    known.seconds.append((time.time(), (int(stat[11]) + int(stat[12])) / _TICKS))
    known.peak_bytes = max(known.peak_bytes, int(peak[1]) * 1024)
    known.anonymous_bytes = max(known.anonymous_bytes, int(anonymous[1]) * 1024)
