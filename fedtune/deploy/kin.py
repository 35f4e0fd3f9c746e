"""What ties the processes of a supervisor to it, on each operating system.

Linux: a direct child asks to be killed with its parent (`launcher.py`), the supervisor adopts
orphans below it and reaps them, and `guard.py` kills what is left. macOS and other POSIX systems:
the guard alone, which kills the process groups; a process that left its group outlives a SIGKILL
of the supervisor there. Windows: a job object, which the system empties when its last handle
closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from fedtune.config import inherited_environment
from fedtune.deploy import guard, launcher

_PR_SET_CHILD_SUBREAPER = 36


def launch_command(command: tuple[str, ...]) -> list[str]:
    """The command, on Linux through the launcher."""
    if sys.platform != "linux":
        return list(command)
    path = str(Path(launcher.__file__).resolve())
    return [sys.executable, "-I", "-S", path, str(os.getpid()), *command]


def adopt_orphans() -> None:
    """Make this process the parent of every process below it that loses its own (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(known: Collection[int]) -> None:
    """Take note of the ends of adopted processes, so that none stays as a zombie.

    Args:
        known: processes that somebody else here waits for.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(ChildProcessError):
        while True:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid in known:
                return
            os.waitpid(found.si_pid, 0)


def group_lives(group: int) -> bool:
    """Whether a process group has members, zombies among them (POSIX)."""
    return _send(group, 0)


def end_group(group: int) -> None:
    """Ask the processes of a group to end."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            os.kill(group, signal.CTRL_BREAK_EVENT)
    else:
        _send(group, signal.SIGTERM)


def kill_group(group: int) -> None:
    """End the processes of a group."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            os.kill(group, signal.SIGTERM)  # TerminateProcess
    else:
        _send(group, signal.SIGKILL)


def _send(group: int, number: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so of a group of zombies
        return False
    return True


class Guard:
    """The process that outlives this one for a moment, to end what it started."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def add(self, group: int) -> None:
        """A group was started."""
        self._groups.add(group)
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        """A group has ended."""
        self._groups.discard(group)
        self._tell(f"-{group}\n")

    def renew(self) -> bool:
        """Start the guard again where it has ended; says whether it did."""
        if sys.platform == "win32" or (self._process and self._process.poll() is None):
            return False
        try:
            self._start()
        except OSError:  # no memory, or too many processes: tried again at the next look
            return False
        return True

    def __enter__(self) -> Guard:
        if sys.platform == "win32":
            from fedtune.deploy.windows_job import end_children_with_this_process

            end_children_with_this_process()
        else:
            self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let it look for what is left, and wait for it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _start(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guard.__file__).resolve()), self.mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env=inherited_environment(),
        )
        for group in self._groups:
            self._tell(f"+{group}\n")

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended; the loop renews it
                self._process.stdin.write(line.encode())
