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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE
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
        """What only the deployment can do: `shape`, `start`, `fail-routes`, `set-clock`, ..."""

    def progress(self) -> float:
        """Rounds that are done, and the share of the open one; negative before the first."""

    def working(self, who: str) -> bool:
        """Whether a process computes now."""

    def asked(self, who: str, message: str) -> bool:
        """Whether a site's node has been given a message whole, and has not sent its answer."""

    def numbers(self) -> Mapping[str, float]:
        """What was measured of the run; units in the names."""

    def wait(self, seconds: float) -> str:
        """How the run ended: `finished`, `failed`, ...; empty: it did not, in so many seconds."""

    def result(self) -> str:
        """Digest of the run's last checkpoint, tensors only."""

    def simulated(self) -> str:
        """Digest of what a simulation comes to that follows the run's own plan."""

    def missing(self) -> Mapping[str, Sequence[int]]:
        """Device -> rounds that the ledger says it was missing in."""

    def reason(self) -> str:
        """Why the run failed, as its ledger says."""

    def left(self) -> Sequence[int]:
        """Processes that are still there once everything was told to end."""


Act: TypeAlias = Callable[[Deployment], None]


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        inject: lets it happen.
        heal: the way back; for what heals itself (a supervisor starts a process again), nothing.
        after_s: from the injection to the healing.
        at: share of the run at which it happens; None: drawn by the seed.
        working: a process that must be computing at that moment.
        asked: a site, and the message that must be out to it at that moment.
        measures: the run lets its sites measure, and plans them by that; its result must be that of
            a simulation of this plan.
        shows: what must have been counted at the end, or the fault has hit nothing.
        rounds: of its run; 0: as many as the others' runs have.
        returns: device that must miss a round, and be there again in the last one.
    """

    name: str
    inject: Act
    heal: Act
    expect: Expectation
    after_s: float = 0.0
    at: float | None = None
    working: str = ""
    asked: tuple[str, str] | None = None
    measures: bool = False
    shows: str = ""
    rounds: int = 0
    returns: str = ""


Start: TypeAlias = Callable[[Fault], AbstractContextManager[Deployment]]
"""Starts a deployment for a case, with a run of its `rounds`; leaving it ends what it started."""


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


def amid_transfer(site: str) -> Act:
    """Cut a site's link, which is made slow first, so that something is on its way."""

    def act(deployment: Deployment) -> None:
        deployment.call(site, "shape", bytes_per_s=4_000.0)
        time.sleep(3.0)
        deployment.call(site, "shape", cut=True)

    return act


_BALLAST = "ballast"
_LOOK_S = 0.02
"""Between two looks whether a moment has come; a site may answer a question in 0.1 s."""


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


def _killed(name: str, who: str, place: str) -> Fault:
    """All processes of a place end without a word, and are started again as after a boot."""
    everything = send(who, signal.SIGKILL, most=99)
    return Fault(name, everything, call(place, "start"), "equal or named", after_s=3.0)


def _forgets(question: str, message: str, at: float, *, measures: bool = False) -> Fault:
    """A node is killed that has taken a question: Flower does not deliver it twice."""
    return Fault(
        f"a site's node killed while it is asked {question}",
        send("site-2/node", signal.SIGKILL),
        nothing,
        "equal",
        at=at,
        asked=("site-2", message),
        measures=measures,
        shows="asked_again",
    )


UNDISTURBED = Fault("undisturbed", nothing, nothing, "equal", at=0.0)

KILLS: tuple[Fault, ...] = (
    *(
        _killed(f"coordinator killed, {i + 1} of 10", "coordinator", "coordinator")
        for i in range(10)
    ),
    *(
        Fault(f"{part} killed", send(f"coordinator/{part}", signal.SIGKILL), nothing, "equal")
        for part in ("runner", "run", "desk")
    ),
    *(
        Fault(
            f"link killed, {i + 1} of 2",  # more at once would be a crash loop
            send("coordinator/link", signal.SIGKILL),
            nothing,
            "equal",
        )
        for i in range(2)
    ),
    _killed("the coordinator's supervisor killed", "coordinator/supervisor", "coordinator"),
    *(_killed(f"{site} killed", site, site) for site in ("site-1", "site-2", "site-3")),
    *(
        Fault(f"a site's {part} killed", send(f"site-2/{part}", signal.SIGKILL), nothing, "equal")
        for part in ("node", "executor")
    ),
    _forgets("what it is", PROFILE, 0.0),
    _forgets("what matters to it", CALIBRATE, 0.0, measures=True),
    _forgets("for the final loss", EVALUATE, 1.0),
)
"""Processes that end without a word; their supervisors, or the boot, start them again."""

FLEET_ROUTES = tuple(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "pull-messages", "push-messages", "get-run", "get-fab", "pull-object",
        "push-object", "confirm-message-received", "send-node-heartbeat", "deactivate-node",
    )
)  # fmt: skip
RUNTIME_ROUTES = tuple(
    f"/v1/runtime/{name}"
    for name in (
        "acquire-task", "get-nodes", "pull-messages", "push-messages", "pull-object",
        "push-object", "confirm-message-received", "send-task-heartbeat", "push-task-output",
        "pull-task-input",
    )
)  # fmt: skip
CONTROL_ROUTES = ("/v1/control/list-runs", "/v1/control/list-nodes", "/v1/control/start-run")


def _fails(name: str, routes: Sequence[str], how: str = "") -> Fault:
    inject = call("coordinator", "fail-routes", routes=routes, how=how)
    return Fault(name, inject, nothing, "equal", at=0.0)


def _fails_and_restarts(name: str, routes: Sequence[str], how: str = "") -> Fault:
    """As `_fails`; and a node is ended, so that the routes of coming and going are asked, too."""
    fault = _fails(name, routes, how)

    def inject(deployment: Deployment) -> None:
        fault.inject(deployment)
        send("site-1/node", signal.SIGTERM)(deployment)

    return replace(fault, inject=inject)


ROUTES: tuple[Fault, ...] = (
    _fails_and_restarts("HTTP 500 once on each fleet route", FLEET_ROUTES),
    _fails("HTTP 500 once on each runtime route", RUNTIME_ROUTES),
    _fails("HTTP 500 once on each control route", CONTROL_ROUTES),
    *(
        _fails(f"HTTP 500 on {route}", [route])
        for route in (*FLEET_ROUTES, *RUNTIME_ROUTES, *CONTROL_ROUTES)
    ),
)

LOST: tuple[Fault, ...] = (
    _fails_and_restarts("an answer lost once on each fleet route", FLEET_ROUTES, "lost"),
    _fails("an answer lost once on each runtime route", RUNTIME_ROUTES, "lost"),
    *(
        _fails(f"an answer lost on {route}", [route], "lost")
        for route in (*FLEET_ROUTES, *RUNTIME_ROUTES, *CONTROL_ROUTES)
    ),
)
"""Requests that did what they should, and whose answers did not come."""


def _distant(name: str, **link: object) -> Fault:
    """All sites' links are shaped so."""

    def inject(deployment: Deployment) -> None:
        for site in ("site-1", "site-2", "site-3"):
            deployment.call(site, "link", **link)

    return Fault(name, inject, nothing, "equal", at=0.0)


DISTANCES: tuple[Fault, ...] = (
    _distant("100 ms each way", delay_ms=100, jitter_ms=10),
    _distant("2 of 100 packets lost", loss_percent=2),
    _distant("1 Mbit/s", rate="1mbit"),
    _distant(
        "1 Mbit/s, 100 ms, 2 of 100 lost", delay_ms=100, jitter_ms=10, loss_percent=2, rate="1mbit"
    ),
    Fault(
        "an interface is down for 2 minutes",
        call("site-2", "cut"),
        call("site-2", "heal"),
        "equal or named",
        after_s=120.0,
        at=0.35,
    ),
)
"""What befalls packets; for deployments in network namespaces."""


def _and_back(fault: Fault, device: str, rounds: int) -> tuple[Fault, Fault]:
    """A fault in the first round; and one in the second, in a run that outlasts it."""
    name = f"{fault.name}; the run goes on until it is back"
    return fault, replace(fault, name=name, at=0.02, rounds=rounds, returns=device)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "a device's step is aborted",
        send("site-1/executor", signal.SIGABRT),
        nothing,
        "equal",
        working="site-1/executor",
        at=0.35,
    ),
    Fault(
        "a device's step is killed, as when memory runs out",
        send("site-1/executor", signal.SIGKILL),
        nothing,
        "equal",
        working="site-1/executor",
        at=0.35,
    ),
    Fault(
        "no memory is given in a device's step",
        call("site-1/executor", "limit-memory"),
        nothing,
        "equal or named",
        working="site-1/executor",
        at=0.35,
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
    Fault(
        "a certificate that ends amid a run",
        call("coordinator", "expire", seconds=15.0),
        call("coordinator", "rotate"),
        "equal or named",
        after_s=45.0,
        at=0.0,
    ),
    Fault(
        "a link of 1 Mbit/s with 200 ms each way",
        call("site-2", "shape", bytes_per_s=125_000.0, delay_s=0.2),
        nothing,
        "equal",
        at=0.0,
    ),
    *_and_back(
        Fault(
            "a device stands still for 90 s",
            send("site-1", signal.SIGSTOP, most=99),
            send("site-1", signal.SIGCONT, most=99),
            "equal or named",
            after_s=90.0,
            at=0.35,
        ),
        "site-1",
        rounds=60,
    ),
    *_and_back(
        Fault(
            "a link cut for 2 minutes amid a transfer",
            amid_transfer("site-2"),
            call("site-2", "shape", cut=False, bytes_per_s=0.0),
            "equal or named",
            after_s=120.0,
            at=0.35,
        ),
        "site-2",
        rounds=80,
    ),
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
    expected: str,
    seed: int = 0,
) -> None:
    """Let one fault after another happen, each in a deployment of its own.

    Args:
        rounds: of the deployment's run.
        deadline_s: that a run may take, healing included.
        until: no case begins after this time (`time.monotonic`).
        expected: what an undisturbed run comes to, such as a simulated one.
    """
    for fault in faults:
        if time.monotonic() > until:
            tell(Result(part, fault.name, "skipped", 0.0, "the time of this part is over"))
            continue
        began = time.monotonic()
        try:
            words, numbers = _befall(fault, start, expected, rounds, deadline_s, seed)
        except Exception as error:  # noqa: BLE001 - the other cases go on
            tell(failed(part, fault.name, error, time.monotonic() - began))
        else:
            state: Literal["passed", "failed"] = "failed" if words else "passed"
            tell(Result(part, fault.name, state, time.monotonic() - began, words, numbers))


def _befall(
    fault: Fault, start: Start, expected: str, rounds: int, deadline_s: float, seed: int
) -> tuple[str, dict[str, float]]:
    """What is wrong after a fault, empty: nothing; and what was measured."""
    share = random.Random(f"{seed} {fault.name}").random() if fault.at is None else fault.at
    end = time.monotonic() + deadline_s
    rounds = fault.rounds or rounds
    with start(replace(fault, rounds=rounds)) as deployment:

        def reached() -> bool:
            if deployment.progress() < share * rounds:
                return False
            if fault.asked is not None:
                return deployment.asked(*fault.asked)
            return not fault.working or deployment.working(fault.working)

        while not reached():
            past = share < 1 and deployment.progress() >= rounds
            if past or time.monotonic() > end or deployment.wait(0.0):
                return f"the moment of the fault did not come: {deployment.reason()}", {}
            time.sleep(_LOOK_S)
        at = deployment.progress()
        fault.inject(deployment)
        time.sleep(fault.after_s)
        fault.heal(deployment)
        healed = time.monotonic()
        ended = deployment.wait(max(1.0, end - time.monotonic()))
        numbers = {
            "at_round": round(at, 2),
            "healed_to_end_s": round(time.monotonic() - healed, 1),
            **deployment.numbers(),
        }
        if fault.measures and ended == "finished":
            expected = deployment.simulated()
        words = _judged(fault.expect, ended, deployment, expected) or _returned(
            fault.returns, deployment.missing(), rounds
        )
        numbers["differs"] = float(ended != "finished" or deployment.result() != expected)
        if fault.shows and not numbers.get(fault.shows):
            words = words or f"it has hit nothing: {fault.shows} is 0"
        left = deployment.left()
    return words or (f"processes are left: {list(left)}" if left else ""), numbers


def _returned(device: str, missing: Mapping[str, Sequence[int]], rounds: int) -> str:
    """What is wrong with the way back of a device; empty: nothing, or none is to come back."""
    if device and not missing.get(device):
        return f"{device} was to miss a round, and missed none"
    if device and rounds in missing[device]:
        return f"{device} has not come back: it missed the rounds {list(missing[device])}"
    return ""


def _judged(expect: Expectation, ended: str, deployment: Deployment, expected: str) -> str:
    if not ended:
        return "the run did not end within its deadline"
    if expect == "refused":
        return "" if deployment.reason() else f"it ended {ended}, without a reason"
    if ended != "finished":
        return f"it ended {ended}: {deployment.reason()}"
    if deployment.result() == expected:
        return ""
    missing = deployment.missing()
    if expect == "equal or named" and missing:
        return ""
    named = ", ".join(f"{who} in round {rounds[0]}" for who, rounds in missing.items())
    return f"its result differs; missing by its ledger: {named or 'nobody'}"
