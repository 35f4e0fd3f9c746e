"""`fedtune server start`: which processes a coordinator consists of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fedtune.deploy.answers import https, tcp
from fedtune.deploy.certificates import days_left, read_pair
from fedtune.deploy.health import Identity
from fedtune.deploy.home_run import INSECURE_VARIABLE, INSECURE_WARNING, HomeRun, run_home
from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.deploy.keeper import Child
from fedtune.deploy.logs import LogRecord
from fedtune.errors import DeploymentError


def start(
    folder: Path,
    *,
    dashboard: bool = False,
    insecure: bool = False,
    view: Callable[[LogRecord], None] | None = None,
) -> int:
    """Run a coordinator until a signal says to stop; returns the exit code.

    Args:
        folder: its home.
        dashboard: serve the dashboard, too.
        insecure: without TLS.
        view: shows each log record.

    Raises:
        DeploymentError: the home is not right, is run already, or one of its ports is taken.
    """
    home = CoordinatorHome(folder)
    settings = home.settings()
    if not insecure:
        for path in (home.certificate, home.key, home.ca_certificate):
            if not path.is_file():
                raise DeploymentError(
                    f"{path} is not there; make a new home with: fedtune server init"
                )
        read_pair(home.certificate, home.key)
    ports = {
        "port": (settings.bind, settings.port),
        "service_port": (settings.bind, settings.service_port),
    }
    if dashboard:
        ports["dashboard_port"] = (settings.bind, settings.dashboard_port)
    identity = Identity(
        "coordinator",
        version("fedtune"),
        partial(days_left, home.certificate),
        (home.path / "state" / "desk.prom",),
    )
    children = coordinator_children(home, settings, dashboard=dashboard, insecure=insecure)
    run = HomeRun(home.path, home.logs, identity, children, ports, settings.health_port)
    return run_home(run, view, (INSECURE_WARNING,) if insecure else ())


def coordinator_children(
    home: CoordinatorHome, settings: ServerSettings, *, dashboard: bool, insecure: bool
) -> tuple[Child, ...]:
    """The processes: Flower's link first, then what talks to it."""
    environment = {
        "FEDTUNE_COORDINATOR_HOME": str(home.path),
        "FLWR_HOME": str(home.flower),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **({INSECURE_VARIABLE: "1"} if insecure else {}),
    }
    plain = ("--insecure",) if insecure else ()

    def command(module: str, *more: str) -> tuple[str, ...]:
        # -P: the working folder holds no modules of ours, whatever lies there.
        return (sys.executable, "-P", "-m", f"fedtune_server.{module}", str(home.path), *more)

    return (
        Child(
            "link",
            command("link", *plain),
            environment,
            answers=https(settings.bind, settings.port, "/health", plain=insecure),
            essential=True,
        ),
        Child("runner", command("runner", *plain), environment, after=("link",)),
        Child(
            "desk",
            command("desk", *(("--dashboard",) if dashboard else ()), *plain),
            environment,
            after=("link",),
            answers=tcp(settings.bind, settings.service_port),
        ),
    )
