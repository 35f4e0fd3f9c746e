"""One process that is kept alive: started, listened to, watched, started again."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Literal

from fedtune.config import SUPERVISOR_VARIABLE, inherited_environment
from fedtune.deploy.back_off import BackOff, Waits
from fedtune.deploy.exit_codes import EXIT_CONFIG
from fedtune.deploy.journal import Journal
from fedtune.deploy.kin import Guard, end_group, group_lives, kill_group, launch_command
from fedtune.deploy.logs import MOST_LINE_CHARACTERS, parse_line

ChildState = Literal["waiting", "starting", "up", "silent", "again", "refused", "ended", "stopped"]
"""`waiting`: for another to be up. `silent`: it runs and does not answer. `again`: waits to be
started again. `refused`: it said that a restart does not help. `ended`: it was done."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process that a supervisor keeps alive.

    Attributes:
        name: of the process and of its log.
        command: program and arguments.
        environment: added to the supervisor's own.
        after: names of children that are up before this one starts for the first time.
        answers: says whether the process does its work; called in a thread, at most a few seconds
            long. None: a process that runs is up.
        restart: `failure`: an exit with 0 is the wanted end of it.
        essential: without it the others are of no use: where it refuses to be started again, all
            end.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    answers: Callable[[], bool] | None = None
    restart: Literal["always", "failure"] = "always"
    essential: bool = False


@dataclass(frozen=True, slots=True)
class ChildReport:
    """How a child is doing.

    Attributes:
        since_s: seconds since 1970 at which it came into its state.
        last_exit: exit code of its last end; negative: the signal; None: it has not ended yet.
        last_error: the last error that it wrote, or its last line before an end.
    """

    name: str
    state: ChildState
    pid: int | None
    restarts: int
    since_s: float
    last_exit: int | None
    last_error: str
    crash_loop: bool


class _Probe(threading.Thread):
    """Asks a process again and again whether it answers."""

    def __init__(self, answers: Callable[[], bool], often_s: float, seldom_s: float) -> None:
        super().__init__(daemon=True)
        self._answers = answers
        self._often_s = often_s
        self._seldom_s = seldom_s
        self._over = threading.Event()
        self.answered_s: float | None = None  # monotonic time of the last answer

    def run(self) -> None:
        wait_s = 0.0
        while not self._over.wait(wait_s):
            wait_s = self._often_s if self.answered_s is None else self._seldom_s
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._answers():
                    self.answered_s = time.monotonic()

    def end(self) -> None:
        self._over.set()


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that a process is given.

    Attributes:
        grace_s: from the request to end to the kill; with what a busy machine adds, the end of all
            is to come within five seconds.
        silent_s: without an answer until it is called silent.
        hung_s: without an answer until it is killed and started again.
        often_s: between two questions before the first answer.
        seldom_s: and after it.
        tick_s: between two looks at all processes, where nothing wakes the supervisor.
    """

    grace_s: float = 3.5
    silent_s: float = 40.0
    hung_s: float = 300.0
    often_s: float = 0.25
    seldom_s: float = 10.0
    tick_s: float = 0.2


class Keeper:
    """Keeps one child alive; its methods are called by one thread, that of the supervisor."""

    def __init__(
        self,
        child: Child,
        journal: Journal,
        guard: Guard,
        waits: Waits,
        patience: Patience,
        chance: random.Random,
    ) -> None:
        self.child = child
        self._journal = journal
        self._guard = guard
        self._patience = patience
        self._back_off = BackOff(waits, chance)
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._probe: _Probe | None = None
        self._started_s = 0.0
        self._start_at_s = 0.0
        self._state: ChildState = "waiting"
        self._since_s = time.time()
        self._was_up = False
        self._was_killed = False
        self._restarts = -1
        self._last_exit: int | None = None
        self._last_line = ""
        self._last_error = ""

    @property
    def state(self) -> ChildState:
        return self._state

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def has_been_up(self) -> bool:
        return self._was_up

    @property
    def failing(self) -> bool:
        """Whether it needs a person: refused, or in a crash loop."""
        return self._state == "refused" or self._back_off.in_crash_loop

    def report(self) -> ChildReport:
        """How it is doing."""
        return ChildReport(
            self.child.name,
            self._state,
            self.pid,
            max(self._restarts, 0),
            self._since_s,
            self._last_exit,
            self._last_error,
            self._back_off.in_crash_loop,
        )

    def step(self, now: float, may_start: bool) -> None:
        """Do what is due.

        Args:
            now: seconds of the monotonic clock.
            may_start: those that this one waits for are up.
        """
        if self._process is not None:
            if self._has_ended():
                self._after_end(now)
            else:
                self._watch(now)
        elif (self._state == "waiting" and may_start) or (
            self._state == "again" and now >= self._start_at_s
        ):
            self._start(now)

    def end(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._become("stopped")
            end_group(self._process.pid)
        elif self._state not in ("refused", "ended"):
            self._become("stopped")

    def kill(self) -> None:
        """End it, and all in its group."""
        if self._process is not None:
            kill_group(self._process.pid)

    def is_gone(self) -> bool:
        """Whether neither it nor anything in its group is left; takes note of its end."""
        if self._process is None:
            return True
        if self._process.poll() is None or group_lives(self._process.pid):
            return False
        self._settle(self._process.poll())
        return True

    def _start(self, now: float) -> None:
        child = self.child
        environment = {**inherited_environment(), "PYTHONUNBUFFERED": "1", **child.environment}
        environment[SUPERVISOR_VARIABLE] = self._guard.mark
        self._restarts += 1
        self._started_s = now
        self._was_killed = False
        try:
            self._process = _popen(launch_command(child.command), environment)
        except OSError as error:
            self._last_error = f"{child.command[0]} cannot be started ({error.strerror})"
            self._again(now, 127)
            return
        self._guard.add(self._process.pid)
        self._journal.say("info", f"{child.name} is started", {"pid": self._process.pid})
        self._become("starting")
        assert self._process.stdout is not None
        self._listener = threading.Thread(
            target=self._listen, args=(self._process.stdout,), daemon=True
        )
        self._listener.start()
        if child.answers is not None:
            self._probe = _Probe(child.answers, self._patience.often_s, self._patience.seldom_s)
            self._probe.start()

    def _listen(self, stream: IO[bytes]) -> None:
        """In a thread: keep what the process writes, until it and its own children are gone."""
        with stream:
            while line := stream.readline(4 * MOST_LINE_CHARACTERS):
                if not line.strip():
                    continue
                record = parse_line(self.child.name, line.decode("utf-8", "replace"))
                self._journal.add(self.child.name, record)
                self._last_line = str(record["message"])
                if record["level"] in ("error", "critical"):
                    self._last_error = self._last_line

    def _watch(self, now: float) -> None:
        lived_s = now - self._started_s
        self._back_off.lived(lived_s)
        if self._probe is None:
            answered_s: float | None = now
        else:
            answered_s = self._probe.answered_s
        silent_s = now - (self._started_s if answered_s is None else answered_s)
        if silent_s > self._patience.hung_s:
            if not self._was_killed:  # it may take a while to go
                self._was_killed = True
                words = f"{self.child.name} has not answered for {silent_s:.0f} s; it is killed"
                self._journal.say("error", words)
            self.kill()
        elif answered_s is not None:
            self._become("silent" if silent_s > self._patience.silent_s else "up")

    def _has_ended(self) -> bool:
        """Whether it ended; if so, its group is killed before the end is taken note of.

        In this order the group's number cannot have been given to others.
        """
        assert self._process is not None
        if sys.platform == "linux":
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self._process.pid, flags) is None:
                    return False
        elif self._process.poll() is None:
            return False
        kill_group(self._process.pid)
        self._process.wait()
        return True

    def _after_end(self, now: float) -> None:
        assert self._process is not None
        if self._listener is not None:
            self._listener.join(0.5)  # its last words
        self._settle(code := self._process.returncode)
        if code != 0:
            self._last_error = self._last_line or self._last_error
        if code == EXIT_CONFIG:
            self._become("refused")
            self._journal.say(
                "error", f"{self.child.name} is not started again: {self._last_error}"
            )
        elif code == 0 and self.child.restart == "failure":
            self._become("ended")
            self._journal.say("info", f"{self.child.name} is done")
        else:
            self._again(now, code)

    def _again(self, now: float, code: int) -> None:
        wait_s = self._back_off.wait_s(lived_s=now - self._started_s, exit_code=code)
        self._start_at_s = now + wait_s
        self._last_exit = code
        self._become("again")
        self._journal.say(
            "error" if self._back_off.in_crash_loop else "warning",
            f"{self.child.name} ended with {exit_words(code)}; started again in {wait_s:.1f} s",
            {"exit": code, "crash_loop": self._back_off.in_crash_loop},
        )

    def _settle(self, code: int | None) -> None:
        assert self._process is not None
        self._guard.remove(self._process.pid)
        self._last_exit = code
        self._process = None
        if self._probe is not None:
            self._probe.end()
            self._probe = None

    def _become(self, state: ChildState) -> None:
        self._was_up = self._was_up or state == "up"
        if state != self._state:
            self._state = state
            self._since_s = time.time()


def exit_words(code: int) -> str:
    """`exit code 1`, or `signal SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def _popen(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: a terminal's Ctrl-C reaches the supervisor alone."""
    flags: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
        creationflags=flags,
    )
