"""Supervises one home, from its lock to its last log line: the same for coordinators and sites."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.back_off import Waits
from fedtune.deploy.health import HealthServer, Identity, write_status
from fedtune.deploy.journal import Journal
from fedtune.deploy.keeper import Child, Patience
from fedtune.deploy.logs import LogRecord
from fedtune.deploy.notify import Notifier
from fedtune.deploy.ports import check_ports
from fedtune.deploy.single import STATUS_FILE, hold
from fedtune.deploy.supervisor import Report, Supervisor
from fedtune.errors import DeploymentError

INSECURE_WARNING = (
    "--insecure: nothing is encrypted, and whoever can reach the port can read and change all that "
    "sites and coordinator say; never use it outside a test"
)
INSECURE_VARIABLE = "FEDTUNE_INSECURE"
"""Set to 1 for every process that is started with --insecure."""


@dataclass(frozen=True, slots=True)
class HomeRun:
    """What is run in a home.

    Attributes:
        home: the folder.
        logs: where its logs lie.
        ports: settings key -> address and port, all that the children will listen on.
        health_port: of /health and /metrics, on loopback.
        waits, patience: of the supervisor.
    """

    home: Path
    logs: Path
    identity: Identity
    children: Sequence[Child]
    ports: Mapping[str, tuple[str, int]]
    health_port: int
    waits: Waits = Waits()  # noqa: RUF009  frozen
    patience: Patience = Patience()  # noqa: RUF009  frozen


def run_home(
    run: HomeRun, view: Callable[[LogRecord], None] | None, warnings: Sequence[str] = ()
) -> int:
    """Supervise until a signal says to stop; returns the exit code.

    Args:
        view: shows each log record.
        warnings: said once, at the start.

    Raises:
        DeploymentError: the home is run already, or a port is taken.
    """
    lock = hold(run.home)
    try:
        check_ports({**run.ports, "health_port": ("127.0.0.1", run.health_port)})
        journal = Journal(run.logs, view)
        try:
            health = f"http://127.0.0.1:{run.health_port}/health"
            journal.say("info", f"{run.identity.name} starts", {"home": run.home, "health": health})
            for warning in warnings:
                journal.say("warning", warning)
            return _supervise(run, journal)
        finally:
            journal.close()
    finally:
        lock.release()


def _supervise(run: HomeRun, journal: Journal) -> int:
    status_file = run.logs / STATUS_FILE

    def watch(report: Report) -> None:
        write_status(status_file, report, run.identity)

    supervisor = Supervisor(
        run.children,
        journal,
        waits=run.waits,
        patience=run.patience,
        notifier=Notifier.from_environment(),
        watch=watch,
        own_process=True,
    )
    watch(supervisor.report)
    with _health_server(run, supervisor):
        return supervisor.run()


def _health_server(run: HomeRun, supervisor: Supervisor) -> HealthServer:
    try:
        return HealthServer(run.health_port, lambda: supervisor.report, run.identity)
    except OSError as error:
        words = "is taken" if error.errno == errno.EADDRINUSE else f"fails ({error.strerror})"
        raise DeploymentError(
            f"health_port = {run.health_port}: the port {words}; choose another one"
        ) from None
