"""Starts and ends the processes of a deployment in tests, and waits for what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from fedtune.deploy.homes import CoordinatorHome, SiteHome
from fedtune.errors import DeploymentError
from fedtune.flwr_compat import Control, FlowerRun, run_fab
from tests.deployment.homes import OPERATOR_TOKEN, free_ports, make_coordinator, make_site

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TASK = {
    "name": "tiny",
    "seed": 0,
    "task": "causal-lm",
    "data": {},
    "compute": "fp32",
    "cuda_graph": "auto",
    "tune_allocator": False,
}


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until a condition is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not so after {seconds:.0f} s"
        time.sleep(0.1)


class Deployment:
    """A coordinator and its sites below one folder; `close` ends all of them."""

    def __init__(self, folder: Path, sites: int, more: str = "", *, insecure: bool = False) -> None:
        ports = free_ports(1 + sites)
        self.folder = folder
        self.plain = ("--insecure",) if insecure else ()
        self.home: CoordinatorHome = make_coordinator(folder / "coordinator", ports[0], more)
        self.address = f"localhost:{ports[0]}"
        self.sites: list[SiteHome] = [
            make_site(folder / f"site-{n}", f"site-{n}", self.home, ports[1 + n])
            for n in range(sites)
        ]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment: dict[str, str] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start Python with arguments; its output goes to `NAME.out`."""
        path = os.pathsep.join(str(ROOT / part) for part in ("", "server", "client"))
        environment = {**os.environ, **self.environment}
        kept = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [kept, path]))
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=output, stderr=output, env=environment
            )
        self.processes[name] = process
        return process

    def start_link(self) -> None:
        self.start("link", str(HERE / "link_launcher.py"), str(self.home.path), *self.plain)

    def start_runner(self) -> None:
        app = "tests.deployment.apps:server"
        command = ("-m", "fedtune_server.runner", str(self.home.path), "--app", app)
        self.start("runner", *command, *self.plain)

    def start_node(self, number: int) -> None:
        path = str(self.sites[number].path)
        self.start(f"node-{number}", "-m", "fedtune_client.node", path, *self.plain)

    def start_executor(self, number: int) -> None:
        path = str(self.sites[number].path)
        module = ("--app", "tests.deployment.apps")
        self.start(f"executor-{number}", "-m", "fedtune_client.executor", path, *module)

    def start_all(self) -> None:
        self.start_link()
        self.start_runner()
        for number in range(len(self.sites)):
            self.start_node(number)
            self.start_executor(number)

    def output(self, name: str) -> str:
        """What a process printed, and what it wrote to its log."""
        kind, _, number = name.partition("-")
        home = self.sites[int(number)].path if number else self.home.path
        paths = (self.folder / f"{name}.out", home / "logs" / f"{kind}.log")
        return "".join(path.read_text("utf-8", "replace") for path in paths if path.exists())

    @cached_property
    def control(self) -> Control:
        ca = None if self.plain else self.home.ca_certificate.read_bytes()
        return Control(self.address, ca, OPERATOR_TOKEN)

    def plan(self, **orders: object) -> None:
        """What the tests' ServerApp is to do; see `apps.server`."""
        plan = {"nodes": len(self.sites), **orders}
        (self.home.path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        (self.home.path / "result.json").unlink(missing_ok=True)

    def begin(self, config: dict[str, str] | None = None) -> int:
        """Start a run, as soon as the link answers."""
        fab = run_fab(config or {"fedtune-run": "tiny", "fedtune-task": json.dumps(TASK)})
        wait_for(lambda: answers(self.control), "the link answers")
        return self.control.start_run(fab)

    def result(self, run_id: int, seconds: float = 60.0) -> dict[str, str]:
        """What the tests' ServerApp wrote, once its run has completed."""
        run = self.ended(run_id, seconds)
        assert run.sub_status == "completed", run
        found: dict[str, str] = json.loads((self.home.path / "result.json").read_text("utf-8"))
        return found

    def ended(self, run_id: int, seconds: float = 60.0) -> FlowerRun:
        """A run, once it has ended."""

        def has_ended() -> bool:
            return answers(self.control) and self.control.runs()[run_id].status == "finished"

        wait_for(has_ended, "the run ends", seconds)
        return self.control.runs()[run_id]

    def stop(self, name: str) -> float:
        """End a process with SIGTERM; returns the seconds that it took."""
        process = self.processes.pop(name)
        started = time.monotonic()
        process.terminate()
        assert process.wait(10) == 0, f"{name}: exit code {process.returncode}"
        return time.monotonic() - started

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        self.control.close()


def answers(control: Control) -> bool:
    try:
        control.runs()
    except DeploymentError:
        return False
    return True
