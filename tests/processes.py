"""Real processes in tests: started, waited for, stopped, and proven to be gone.

    with Processes() as processes:
        started = processes.start([sys.executable, "-m", "fedtune", "server", "start", str(home)])
        wait_for(lambda: "up" in started.output(), 20, "the coordinator is up")
        assert started.stop() == 0
        processes.assert_none_left()

What a test starts carries a mark in its environment, and so does all that this starts in turn: a
process that left its parent and its group is found by it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import psutil

MARK = "FEDTUNE_TEST_MARK"

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Wait until a condition gives something true, and return that.

    Raises:
        AssertionError: it did not within the time; the message says what was waited for.
    """
    until = time.monotonic() + timeout_s
    while True:
        if found := condition():
            return found
        assert time.monotonic() < until, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listened on a moment ago, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Started:
    """One process of a test, with what it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        """All that it wrote until now, on both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send(self, number: int) -> None:
        """Send a signal, where it still lives."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 10.0) -> int:
        """Its exit code.

        Raises:
            AssertionError: it goes on.
        """
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"process {self.pid} goes on after {timeout_s} s; it wrote:\n{self.output()}"
            ) from None

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ask it to end; its exit code."""
        self.send(signal.SIGTERM)
        return self.wait(timeout_s)


class Processes:
    """Starts processes, and ends all of them and what they started when it is left."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._all: list[Started] = []
        self._folder = tempfile.TemporaryDirectory(prefix="fedtune-processes-")

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Started:
        """Start a process; its output goes to a file.

        Args:
            environment: added to the test's own.
            folder: to work in.
        """
        log = Path(self._folder.name) / f"{len(self._all)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), MARK: self._mark},
                cwd=folder,
            )
        started = Started(process, log)
        self._all.append(started)
        return started

    def living(self) -> list[psutil.Process]:
        """Every process that a process of this test started and that goes on."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if (
                    process.environ().get(MARK) == self._mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def assert_none_left(self, timeout_s: float = 3.0) -> None:
        """That all is gone, after a moment.

        Raises:
            AssertionError: something is left; the message names it.
        """
        until = time.monotonic() + timeout_s
        while left := self.living():
            if time.monotonic() > until:
                words = []
                for process in left:
                    with suppress(psutil.Error, OSError):
                        words.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
                raise AssertionError(f"processes are left: {words}")
            time.sleep(0.05)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for started in self._all:
            if started.process.poll() is None:
                started.process.kill()
            started.process.wait()
        for process in self.living():
            with suppress(psutil.Error, OSError):
                process.kill()
        self._folder.cleanup()
