"""`fedtune client start`: which processes a site consists of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from fedtune.deploy.answers import tcp
from fedtune.deploy.health import Identity
from fedtune.deploy.home_run import INSECURE_VARIABLE, INSECURE_WARNING, HomeRun, run_home
from fedtune.deploy.homes import SiteHome
from fedtune.deploy.keeper import Child
from fedtune.deploy.logs import LogRecord
from fedtune.errors import DeploymentError


def start(
    folder: Path,
    *,
    insecure: bool = False,
    view: Callable[[LogRecord], None] | None = None,
) -> int:
    """Run a site until a signal says to stop; returns the exit code.

    Args:
        folder: its home.
        insecure: talk to the coordinator without TLS.
        view: shows each log record.

    Raises:
        DeploymentError: the home is not right, is run already, or one of its ports is taken.
    """
    home = SiteHome(folder)
    settings = home.settings()
    for path in (home.node_key, *(() if insecure else (home.ca_certificate,))):
        if not path.is_file():
            raise DeploymentError(f"{path} is not there; make it with: fedtune client join")
    identity = Identity(
        settings.site.name,
        version("fedtune"),
        metric_files=(home.state / "metrics.prom",),
    )
    run = HomeRun(
        home.path,
        home.logs,
        identity,
        site_children(home, settings.site.node_port, insecure=insecure),
        {"node_port": ("127.0.0.1", settings.site.node_port)},
        settings.site.health_port,
    )
    return run_home(run, view, (INSECURE_WARNING,) if insecure else ())


def site_children(home: SiteHome, node_port: int, *, insecure: bool) -> tuple[Child, ...]:
    """The processes: Flower's node, and the executor that trains; each waits for the other."""
    environment = {
        "FEDTUNE_SITE_HOME": str(home.path),
        "FLWR_HOME": str(home.state / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **({INSECURE_VARIABLE: "1"} if insecure else {}),
    }
    plain = ("--insecure",) if insecure else ()

    def command(module: str) -> tuple[str, ...]:
        # -P: the working folder holds no modules of ours, whatever lies there.
        return (sys.executable, "-P", "-m", f"fedtune_client.{module}", str(home.path), *plain)

    return (
        Child(
            "node",
            command("node"),
            environment,
            answers=tcp("127.0.0.1", node_port),
            essential=True,
        ),
        Child("executor", command("executor"), environment),
    )
