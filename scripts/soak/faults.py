"""What befalls a deployment, what it is healed by, and what must be true afterwards.

A fault is a row of a table. `play` starts a deployment for it, waits for a moment of its run, lets
the fault happen, heals it, and waits for the end: the run must end in time, leave no process, and
its result must be that of a run that nothing befell, or its ledger must name who was missing.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from scripts.soak.results import Result, Tell, failed

Expectation: TypeAlias = Literal["equal", "equal or named", "refused"]
"""`equal`: the result has the bytes of the undisturbed run's; `equal or named`: or the ledger says
which device was missing in which round; `refused`: the run ends in words."""


class Deployment(Protocol):
    """A coordinator and devices as processes, with one run on them."""

    def pids(self, who: str) -> Sequence[int]:
        """Processes of a place that are there now: `coordinator`, or a site's name; children last.

        A part of a place is named behind a slash: `coordinator/link`, `site-1/executor`.
        """

    def home(self, who: str) -> Path:
        """The folder of a place."""

    def call(self, who: str, action: str, **details: object) -> None:
        """What only the deployment can do: `cut`, `heal`, `fail-route`, `set-clock`, `expire`."""

    def progress(self) -> float:
        """Rounds that are done, and the share of the open one; negative before the first."""

    def wait(self, seconds: float) -> str:
        """How the run ended: `finished`, `failed`, ...; empty: it did not, in so many seconds."""

    def result(self) -> str:
        """Digest of the run's last checkpoint, tensors only."""

    def missing(self) -> Mapping[str, Sequence[int]]:
        """Device -> rounds that the ledger says it was missing in."""

    def reason(self) -> str:
        """Why the run failed, as its ledger says."""

    def left(self) -> Sequence[int]:
        """Processes that are still there once everything was told to end."""


Start: TypeAlias = Callable[[str], AbstractContextManager[Deployment]]
"""Starts a deployment for a case; leaving it ends everything that it started."""
Act: TypeAlias = Callable[[Deployment], None]


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        inject: lets it happen.
        heal: the way back; for what heals itself (a supervisor starts a process again), nothing.
        after_s: from the injection to the healing.
        at: share of the run at which it happens; None: drawn by the seed.
    """

    name: str
    inject: Act
    heal: Act
    expect: Expectation
    after_s: float = 0.0
    at: float | None = None


def nothing(deployment: Deployment) -> None:
    """It heals itself."""


def send(who: str, number: signal.Signals, most: int = 1) -> Act:
    """A signal to the first processes of a place."""

    def act(deployment: Deployment) -> None:
        pids = deployment.pids(who)
        if not pids:
            raise ProcessLookupError(f"there is no process of {who}")
        for pid in pids[:most]:
            os.kill(pid, number)

    return act


def call(who: str, action: str, **details: object) -> Act:
    return lambda deployment: deployment.call(who, action, **details)


_BALLAST = "ballast"


def fill_disk(who: str) -> Act:
    """Fill the file system of a place's home, which must be one of its own, and a small one."""

    def act(deployment: Deployment) -> None:
        home = deployment.home(who)
        if os.stat(home).st_dev == os.stat(home.parent).st_dev:
            raise OSError(f"{home} shares its disk; mount a small tmpfs there")
        with (home / _BALLAST).open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    return act


def free_disk(who: str) -> Act:
    return lambda deployment: (deployment.home(who) / _BALLAST).unlink(missing_ok=True)


KILLS: tuple[Fault, ...] = tuple(
    Fault(
        f"coordinator killed, {i + 1} of 10",
        send("coordinator/runner", signal.SIGKILL, most=99),
        nothing,
        "equal",
    )
    for i in range(10)
) + tuple(
    Fault(f"{site} killed", send(site, signal.SIGKILL, most=99), nothing, "equal or named")
    for site in ("site-1", "site-2", "site-3")
)
"""Processes that end without a word; their supervisors start them again."""

ROUTES = ("pull-message", "push-object", "pull-object", "confirm-message", "heartbeat")
"""Of Flower's fleet API; each fails once with an HTTP 500."""

FAULTS: tuple[Fault, ...] = (
    Fault(
        "a device stands still for 90 s",
        send("site-1", signal.SIGSTOP, most=99),
        send("site-1", signal.SIGCONT, most=99),
        "equal or named",
        after_s=90.0,
    ),
    Fault(
        "out of memory in a device's step",
        send("site-1/executor", signal.SIGKILL),
        nothing,
        "equal or named",
    ),
    *(
        Fault(f"HTTP 500 on {route}", call("site-1", "fail-route", route=route), nothing, "equal")
        for route in ROUTES
    ),
    Fault(
        "a link cut for 2 minutes",
        call("site-2", "cut"),
        call("site-2", "heal"),
        "equal or named",
        after_s=120.0,
    ),
    Fault("a clock an hour ahead", call("site-1", "set-clock", seconds=3600), nothing, "equal"),
    Fault("a clock an hour behind", call("site-1", "set-clock", seconds=-3600), nothing, "equal"),
    Fault("disk full at a device", fill_disk("site-1"), free_disk("site-1"), "equal or named", 30),
    Fault(
        "disk full at the coordinator",
        fill_disk("coordinator"),
        free_disk("coordinator"),
        "equal",
        30,
    ),
    Fault("a certificate that expires", call("coordinator", "expire"), nothing, "equal or named"),
)


def play(
    faults: Sequence[Fault],
    start: Start,
    tell: Tell,
    *,
    part: str,
    rounds: int,
    deadline_s: float,
    until: float,
    seed: int = 0,
) -> None:
    """Let one fault after another happen, each in a deployment of its own.

    Args:
        rounds: of the deployment's run.
        deadline_s: that a run may take, healing included.
        until: no case begins after this time (`time.monotonic`).
    """
    with start("undisturbed") as deployment:
        ended = deployment.wait(deadline_s)
        expected = deployment.result() if ended == "finished" else ""
    if not expected:
        tell(Result(part, "undisturbed", "failed", deadline_s, f"it ended so: {ended or 'never'}"))
        return
    for fault in faults:
        if time.monotonic() > until:
            tell(Result(part, fault.name, "skipped", 0.0, "the time of this part is over"))
            continue
        began = time.monotonic()
        try:
            words = _befall(fault, start, expected, rounds, deadline_s, seed)
        except Exception as error:  # noqa: BLE001 - the other cases go on
            tell(failed(part, fault.name, error, time.monotonic() - began))
        else:
            state: Literal["passed", "failed"] = "failed" if words else "passed"
            tell(Result(part, fault.name, state, time.monotonic() - began, words))


def _befall(
    fault: Fault, start: Start, expected: str, rounds: int, deadline_s: float, seed: int
) -> str:
    """What is wrong after a fault; empty: nothing."""
    share = random.Random(f"{seed} {fault.name}").random() if fault.at is None else fault.at
    end = time.monotonic() + deadline_s
    with start(fault.name) as deployment:
        while deployment.progress() < share * rounds and time.monotonic() < end:
            time.sleep(0.05)
        fault.inject(deployment)
        time.sleep(fault.after_s)
        fault.heal(deployment)
        ended = deployment.wait(max(1.0, end - time.monotonic()))
        words = _judged(fault.expect, ended, deployment, expected)
    left = deployment.left()
    return words or (f"processes are left: {list(left)}" if left else "")


def _judged(expect: Expectation, ended: str, deployment: Deployment, expected: str) -> str:
    if not ended:
        return "the run did not end within its deadline"
    if expect == "refused":
        return "" if deployment.reason() else f"it ended {ended}, without a reason"
    if ended != "finished":
        return f"it ended {ended}: {deployment.reason()}"
    if deployment.result() == expected:
        return ""
    if expect == "equal or named" and deployment.missing():
        return ""
    return "its result differs, and its ledger names nobody who was missing"
