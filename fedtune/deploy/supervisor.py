"""Keeps the processes of a coordinator or a site alive, and ends them together.

One thread, the main one, starts and ends processes: Linux ends a process that asked for it when the
*thread* that started it ends. Others only read what the processes write, ask whether they answer,
and serve the report.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedtune.deploy.back_off import Waits
from fedtune.deploy.exit_codes import EXIT_CONFIG
from fedtune.deploy.journal import Journal
from fedtune.deploy.keeper import Child, ChildReport, Keeper, Patience
from fedtune.deploy.kin import Guard, adopt_orphans, reap_orphans
from fedtune.deploy.notify import Notifier
from fedtune.deploy.wake import Wake

SupervisorState = Literal["starting", "healthy", "degraded", "failing", "stopping", "stopped"]
"""`degraded`: a process is down or silent and is being brought back. `failing`: one needs a
person: it refused to go on, or is in a crash loop."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a supervisor and its processes are doing.

    Attributes:
        since_s: seconds since 1970 at which the supervisor started.
    """

    state: SupervisorState
    since_s: float
    children: tuple[ChildReport, ...]


class Supervisor:
    """Starts processes and keeps them alive until it is asked to stop.

    Args:
        children: in the order of their start.
        journal: keeps what they say.
        watch: is given every report that differs from the one before, by the supervisor's thread.
        own_process: this process is nothing but the supervisor: it adopts and reaps orphans.
    """

    def __init__(
        self,
        children: Sequence[Child],
        journal: Journal,
        *,
        waits: Waits | None = None,
        patience: Patience | None = None,
        notifier: Notifier | None = None,
        watch: Callable[[Report], None] | None = None,
        own_process: bool = False,
        chance: random.Random | None = None,
    ) -> None:
        self._journal = journal
        self._patience = patience or Patience()
        self._notifier = notifier or Notifier()
        self._watch = watch
        self._own_process = own_process
        self._guard = Guard()
        chance = chance or random.Random()
        self._keepers = [
            Keeper(child, journal, self._guard, waits or Waits(), self._patience, chance)
            for child in children
        ]
        self._wake = Wake()
        self._since_s = time.time()
        self._were_all_up = False
        self._end: Literal["", "stopping", "stopped"] = ""
        self.report = self._report()

    def ask_to_stop(self) -> None:
        """As a signal does; from any thread. A second time: kill at once."""
        self._wake.ask_to_stop()

    def run(self) -> int:
        """Supervise until asked to stop; returns the exit code.

        0: asked to stop. 78: what is essential, or everything, refused to be started again.
        """
        if self._own_process:
            adopt_orphans()
        with self._wake, self._guard:
            try:
                while not self._wake.stops and not self._is_hopeless():
                    self._step()
                    self._wake.wait(self._patience.tick_s)
            finally:
                self._end_all()
        return 0 if self._wake.stops else EXIT_CONFIG

    def _step(self) -> None:
        now = time.monotonic()
        up = {keeper.child.name for keeper in self._keepers if keeper.has_been_up}
        for keeper in self._keepers:
            keeper.step(now, may_start=up.issuperset(keeper.child.after))
        if self._guard.renew():
            self._journal.say("warning", "the guard process had ended; it is started again")
        self._reap()
        self._publish()
        # Where systemd watches, it starts all anew when one is in a crash loop. One that refused
        # would refuse again.
        if not any(child.crash_loop for child in self.report.children):
            self._notifier.alive(now)

    def _is_hopeless(self) -> bool:
        refused = [keeper for keeper in self._keepers if keeper.state == "refused"]
        return any(keeper.child.essential for keeper in refused) or (
            bool(refused) and len(refused) == len(self._keepers)
        )

    def _reap(self) -> None:
        if self._own_process:
            pids = (self._guard.pid, *(keeper.pid for keeper in self._keepers))
            reap_orphans([pid for pid in pids if pid is not None])

    def _end_all(self) -> None:
        """Ask all to end, wait, and kill what is left."""
        self._end = "stopping"
        self._notifier.stopping()
        self._journal.say("info", "stopping")
        until = time.monotonic() + self._patience.grace_s
        for keeper in self._keepers:
            keeper.end()
        self._publish()
        while not self._are_gone():
            self._reap()
            if time.monotonic() >= until or self._wake.stops > 1:
                break
            self._wake.wait(min(self._patience.tick_s, max(0.0, until - time.monotonic())))
        self._kill_rest()
        self._end = "stopped"
        self._publish()
        self._journal.say("info", "stopped")

    def _kill_rest(self) -> None:
        until = time.monotonic() + 0.5  # the system needs a moment to end what is killed
        while not self._are_gone() and time.monotonic() < until:
            for keeper in self._keepers:
                keeper.kill()
            self._reap()
            self._wake.wait(0.02)

    def _are_gone(self) -> bool:
        return all([keeper.is_gone() for keeper in self._keepers])  # each takes note of its end

    def _publish(self) -> None:
        report = self._report()
        if report.state == "healthy" and not self._were_all_up:
            self._were_all_up = True
            self._notifier.ready()
            self._journal.say("info", "all processes are up")
        if report != self.report:
            self.report = report
            self._notifier.status(status_words(report))
            if self._watch is not None:
                self._watch(report)

    def _report(self) -> Report:
        return Report(self._state(), self._since_s, tuple(k.report() for k in self._keepers))

    def _state(self) -> SupervisorState:
        if self._end:
            return self._end
        if any(keeper.failing for keeper in self._keepers):
            return "failing"
        if all(keeper.state in ("up", "ended") for keeper in self._keepers):
            return "healthy"
        return "degraded" if self._were_all_up else "starting"


def status_words(report: Report) -> str:
    """One line: `healthy: link up, runner up, desk up`."""
    children = ", ".join(f"{child.name} {child.state}" for child in report.children)
    return f"{report.state}: {children}"
