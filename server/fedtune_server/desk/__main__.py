"""`python -m fedtune_server.desk HOME [--dashboard] [--insecure]`: the desk as a process.

Exit codes: 0: told to end; 75: start me again; 78: do not, the reason is in the log.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedtune.deploy.exit_codes import EXIT_CONFIG, EXIT_RESTART, EXIT_WANTED
from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.errors import DeploymentError, FedtuneError
from fedtune_server.dashboard.feed import Readings
from fedtune_server.dashboard.metrics import own_metrics
from fedtune_server.desk.assembly import Parts, assemble, serve

_log = logging.getLogger("fedtune_server.desk")


def main(arguments: list[str] | None = None) -> int:
    """Run the desk of a home until SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedtune_server.desk")
    parser.add_argument("home", type=Path)
    parser.add_argument("--dashboard", action="store_true", help="serve the dashboard, too")
    parser.add_argument("--insecure", action="store_true", help="without TLS")
    asked = parser.parse_args(arguments)
    home = CoordinatorHome(asked.home)
    _log_to(home)
    try:
        settings = home.settings()
    except FedtuneError as error:
        _log.error("%s", error)
        return EXIT_CONFIG
    try:
        with _alone(home):
            asyncio.run(_run(home, settings, asked.dashboard, asked.insecure))
    except FedtuneError as error:  # such as a port that another process still has
        _log.error("%s", error)
        return EXIT_RESTART
    except Exception:  # noqa: BLE001  at the edge of the process: in full in the log, and tried again
        _log.exception("the desk ends by a fault")
        return EXIT_RESTART
    return EXIT_WANTED


async def _run(
    home: CoordinatorHome, settings: ServerSettings, dashboard: bool, insecure: bool
) -> None:
    parts = assembled(home, settings, insecure)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Windows has no handlers in the loop; a plain one wakes it as well.
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    readings = Readings(parts.desk, home.certificate, home.logs / "supervisor.json")
    board = _dashboard(parts, readings, insecure) if dashboard else None
    try:
        await serve(
            parts,
            stop,
            insecure,
            lambda port: _log.info("the desk answers on port %d", port),
            lambda: own_metrics(readings),
        )
    finally:
        if board is not None:
            board()


def assembled(home: CoordinatorHome, settings: ServerSettings, insecure: bool) -> Parts:
    """The desk of a home, with its registry and Flower's control.

    Raises:
        DeploymentError: the home's files cannot be read.
    """
    from fedtune import flwr_compat
    from fedtune.deploy.operator import OperatorFile
    from fedtune_server.registry import Registry

    operator = OperatorFile.read(home.operator_file)
    local = _local(settings)
    ca = None if insecure else operator.ca.encode("ascii")
    control = flwr_compat.Control(local, ca, operator.token)
    return assemble(home, settings, Registry(home.registry), control, flwr_compat.run_fab)


def _local(settings: ServerSettings) -> str:
    """The link's address on this machine; its certificate is made for localhost, too."""
    host = "127.0.0.1" if settings.bind in ("0.0.0.0", "::") else settings.bind
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


def _dashboard(parts: Parts, readings: Readings, insecure: bool) -> Callable[[], object]:
    """Serve the dashboard in a thread; returns what ends it."""
    # Without --dashboard, FastAPI is never loaded.
    module = importlib.import_module("fedtune_server.dashboard.serving")
    server = module.serve(readings, parts.settings, parts.home, insecure=insecure)
    stop: Callable[[], object] = server.stop
    return stop


def _log_to(home: CoordinatorHome) -> None:
    try:
        logs = importlib.import_module("fedtune.deploy.logs")
    except ModuleNotFoundError:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        return
    logs.configure("desk", home.logs)


@contextmanager
def _alone(home: CoordinatorHome) -> Iterator[None]:
    """One desk for each home: two would start every run twice."""
    home.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home.path / ".desk.lock", timeout=1.0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise DeploymentError(
            f"another desk works in {home.path}; end it first (fedtune server start runs one)"
        ) from None
    except OSError as error:
        raise DeploymentError(f"{home.path} cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread that waits for Flower must not hold the process up
