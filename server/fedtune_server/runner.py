"""`python -m fedtune_server.runner HOME`: takes runs from the link, each into a process of its own.

What runs is the installed app; the bundle that a run was started with is only read for its
configuration. The process of a run learns its task's token over its standard input, which the
runner keeps open: when the runner dies, the end of that input ends the run's process, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.exit_codes import EXIT_CONFIG
from fedtune.deploy.flower_process import (
    leave,
    start_log,
    talk_to_the_coordinator_alone,
)
from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.memory import return_freed_memory
from fedtune.errors import DeploymentError, FedtuneError

if TYPE_CHECKING:
    from fedtune.flwr_compat import Control, ServerTask, TaskSource

APP = "fedtune_server.deployed:app"
MOST_RUNS = 4
"""Runs at once: each is a process of about 300 MB that joins adapters on all cores."""
POLL_S = 0.5
MOST_WAIT_S = 4.0
STOP_S = 3.5
"""From SIGTERM to the end of a run's process, whatever it does."""

_HOME_VARIABLE = "FEDTUNE_COORDINATOR_HOME"
_log = logging.getLogger("fedtune.runner")


def main(arguments: Sequence[str]) -> None:
    """The process; it never returns."""
    options = _options(arguments)
    return_freed_memory()
    home = CoordinatorHome(options.home)
    talk_to_the_coordinator_alone(home.flower)
    os.environ[_HOME_VARIABLE] = str(home.path)
    name = "run" if options.task else "runner"
    start_log(name, home.logs)
    import fedtune.flwr_compat  # noqa: F401  (its loggers are taken over below)

    start_log(name, home.logs)
    try:
        if options.task:
            play(home, options.app, insecure=options.insecure)
        else:
            Runner(home, options.app, insecure=options.insecure).run()
    except DeploymentError as error:
        _log.error("%s", error)
        leave(EXIT_CONFIG)
    leave(0)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fedtune_server.runner", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--app", default=APP, help="MODULE:NAME of an installed ServerApp")
    parser.add_argument("--task", action="store_true", help="play one run (started by the runner)")
    parser.add_argument("--insecure", action="store_true", help="the link speaks plaintext")
    return parser.parse_args(arguments)


def _link(home: CoordinatorHome, insecure: bool) -> tuple[str, bytes | None, str]:
    """Address of the link on this machine, its CA, and the operator's token."""
    from fedtune_server.operator_token import OperatorToken

    settings = home.settings()
    host = "127.0.0.1" if settings.bind in ("0.0.0.0", "::") else settings.bind
    try:
        ca = None if insecure else home.ca_certificate.read_bytes()
    except OSError as error:
        raise DeploymentError(
            f"{home.ca_certificate} cannot be read ({error.strerror}); "
            "make it with: fedtune server init"
        ) from None
    return f"{host}:{settings.port}", ca, OperatorToken(home.operator_file).read()


class Runner:
    """Acquires tasks, and watches their processes until SIGTERM."""

    def __init__(self, home: CoordinatorHome, app: str, *, insecure: bool = False) -> None:
        self._home = home
        self._command = [sys.executable, "-P", "-m", "fedtune_server.runner", str(home.path)]
        self._command += ["--app", app, "--task", *(["--insecure"] if insecure else [])]
        self._insecure = insecure
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # by task token
        self._stop = threading.Event()
        self._wait_s = POLL_S
        self._alone = False

    def run(self) -> None:
        """Work until SIGTERM or SIGINT; then end every run's process, in less than 5 s.

        Raises:
            DeploymentError: the home is not complete.
        """
        from fedtune.flwr_compat import Control, TaskSource

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        link = _link(self._home, self._insecure)
        source, control = TaskSource("server", *link), Control(*link)
        _log.info("waiting for runs")
        while not self._stop.is_set():
            self._step(source, control)
            self._stop.wait(self._wait_s)
        self._end_children()

    def _step(self, source: TaskSource, control: Control) -> None:
        import httpx

        try:
            self._end_orphans(control)
            self._report_dead(source)
            found = source.acquire() if len(self._children) < MOST_RUNS else None
            self._wait_s = POLL_S
        except (httpx.HTTPError, DeploymentError) as error:
            self._wait_s = min(MOST_WAIT_S, 2 * self._wait_s)
            _log.warning("the link is not there (%s); again in %.1f s", error, self._wait_s)
            return
        if found is not None:
            self._start(*found)

    def _end_orphans(self, control: Control) -> None:
        """At the start: end the runs of a runner before this one, whose processes died with it.

        The link would wait for their heartbeats for minutes; the desk starts them anew at once.
        """
        if self._alone:
            return
        for run_id, run in control.runs().items():
            if run.status in ("starting", "running"):
                _log.warning("run %d was played by a runner that is gone; it is ended", run_id)
                control.stop_run(run_id)
        self._alone = True

    def _start(self, token: str, run_id: int) -> None:
        child = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        assert child.stdin is not None
        self._children[token] = child
        try:
            child.stdin.write(json.dumps({"token": token}).encode() + b"\n")
            child.stdin.flush()
        except OSError:  # it died at once: found below
            pass
        _log.info("run %d plays in process %d", run_id, child.pid)

    def _report_dead(self, source: TaskSource) -> None:
        for token, child in list(self._children.items()):
            if (code := child.poll()) is None:
                continue
            if code != 0:
                _log.warning("the process %d of a run ended with %d", child.pid, code)
                source.fail(token, f"the process of the run ended with exit code {code}")
            del self._children[token]
            assert child.stdin is not None
            child.stdin.close()

    def _end_children(self) -> None:
        for child in self._children.values():
            child.terminate()
        end = time.monotonic() + STOP_S + 0.5
        for child in self._children.values():
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


# ---------------------------------------------------------------- the process of one run


def play(home: CoordinatorHome, app: str, *, insecure: bool = False) -> None:
    """Play one run with the installed app; never returns.

    A stop of the run, SIGTERM and the end of the runner all raise KeyboardInterrupt in the app;
    it then has `STOP_S` to leave.
    """
    from fedtune.flwr_compat import ServerTask

    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    token = json.loads(sys.stdin.buffer.readline())["token"]
    threading.Thread(target=_end_with_runner, daemon=True).start()
    task = ServerTask(*_link(home, insecure), task_token=token, gone=_interrupt_main)
    failure = _outcome(app, task)
    if failure:
        _log.error("the run failed: %s", failure)
    told = _tell_end(task, failure)
    leave(0 if told else 1)


def _outcome(app: str, task: ServerTask) -> str:
    """Run the app; returns why it failed, empty if it did not."""
    try:
        context = task.receive()
        load(app)(task.grid, context)
    except KeyboardInterrupt:
        return "interrupted"
    except FedtuneError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  the edge of a process, logged in full
        _log.exception("the app of the run raised")
        return f"{type(error).__name__}: {error}"
    return ""


def _tell_end(task: ServerTask, failure: str) -> bool:
    import httpx

    try:
        task.end(failure)
    except httpx.HTTPError as error:  # a stopped run; or else the runner will tell it
        _log.warning("the end of the run could not be told to the link (%s)", error)
        return False
    return True


def load(app: str) -> Callable[[Any, Any], Any]:
    """The ServerApp that `MODULE:NAME` means.

    Raises:
        DeploymentError: there is none.
    """
    module, _, name = app.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DeploymentError(f"expected an installed app {app}; found none ({error})") from error
    if not callable(found):
        raise DeploymentError(f"expected {app} to be an app, found {type(found).__name__}")
    return found  # type: ignore[no-any-return]


_interrupted = threading.Event()


def _interrupt(*_: object) -> None:
    """The signal handler: raises in the app, once; and ends the process when that does not help."""
    if _interrupted.is_set():
        return
    _interrupted.set()
    threading.Thread(target=_end_late, daemon=True).start()
    raise KeyboardInterrupt


def _interrupt_main() -> None:
    signal.raise_signal(signal.SIGINT)


def _end_late() -> None:
    time.sleep(STOP_S)
    leave(1)


def _end_with_runner() -> None:
    while sys.stdin.buffer.readline():
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
