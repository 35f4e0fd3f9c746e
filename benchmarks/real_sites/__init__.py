"""A real coordinator and real sites on this machine, for tests, benchmarks and the soak.

Everything goes through the `fedtune` command, as a person would call it: homes are made, sites are
invited and join, both sides are started, a run is handed in. Ports are free ones, and what was
started is ended, whatever happens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import psutil

_LOCAL = r"[('\" b](127\.0\.0\.1|::1|localhost|0\.0\.0\.0|{coordinator})'|^socket\.connect b?'"
"""This machine, the coordinator, or a socket of the file system."""
ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
_OFF = (
    "FLWR_TELEMETRY_ENABLED",
    "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
    "HF_HUB_OFFLINE",
)
"""What tests set, and what the processes must do for themselves."""


class FederationError(AssertionError):
    """What was waited for did not come."""


class Places(Protocol):
    """Where the coordinator and the sites are."""

    def address(self, host: str, /) -> str:
        """By which others reach `coordinator`."""

    def command(self, host: str, command: Sequence[str], /) -> Sequence[str]:
        """A command as it is run at `coordinator`, or at a site."""


Wrap = Callable[[Sequence[str]], Sequence[str]]
"""Makes of a command one that runs in another place."""


def _here(command: Sequence[str]) -> Sequence[str]:
    return command


def environment(**more: str) -> dict[str, str]:
    """The environment of every process: this checkout's packages, and one thread each."""
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    inherited = os.environ.get("PYTHONPATH", "")
    return {
        **{name: value for name, value in os.environ.items() if name not in _OFF},
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
        "PYTHONPATH": os.pathsep.join(
            part for part in (more.get("PYTHONPATH", ""), *paths, inherited) if part
        ),
    }


def fedtune(
    *arguments: str, check: bool = True, wrap: Wrap = _here, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = wrap([sys.executable, "-m", "fedtune", *arguments])
    done = subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=120, check=False
    )
    if check and done.returncode != 0:
        raise FederationError(f"{' '.join(arguments)}: {done.returncode}\n{done.stderr[-3000:]}")
    return done


def wait_for(what: str, found: Callable[[], object], within_s: float, every_s: float = 0.1) -> None:
    """Return once `found` says so.

    Raises:
        FederationError: it did not within the time.
    """
    end = time.monotonic() + within_s
    while not found():
        if time.monotonic() > end:
            raise FederationError(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)


def free_ports(count: int) -> list[int]:
    """Consecutive ports that nobody listens on, below those that systems give to connections.

    Processes that were started one after another look in places far from each other, because what
    one has found stays free until it is used.
    """
    for first in range(20_000 + 97 * os.getpid() % 10_000, 32_000, count):
        sockets = ExitStack()
        with sockets:
            try:
                for port in range(first, first + count):
                    opened = sockets.enter_context(socket.socket())
                    opened.bind((HOST, port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise FederationError("no free ports")


class Started:
    """A command that runs until it is ended, with all that it starts."""

    def __init__(
        self, arguments: Sequence[str], log: Path, wrap: Wrap = _here, **more: str
    ) -> None:
        self.log = log
        self._file = log.open("ab")
        self.process = subprocess.Popen(
            wrap([sys.executable, "-m", "fedtune", *arguments]),
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def tree(self) -> list[psutil.Process]:
        """It and all below it."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def child(self, module: str) -> psutil.Process:
        """The process below it that runs a module.

        Raises:
            FederationError: there is none.
        """
        for process in self.tree():
            try:
                if module in process.cmdline():
                    return process
            except psutil.Error:
                continue
        raise FederationError(f"no process runs {module}; see {self.log}")

    def stop(self, within_s: float = 15.0) -> float:
        """End it as an operator does; seconds that it took, with all below it gone."""
        began, tree = time.monotonic(), self.tree()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise FederationError(f"it did not end within {within_s:g} s; see {self.log}") from None
        self._file.close()
        _, alive = psutil.wait_procs(tree, timeout=5)
        if alive:
            for process in alive:
                process.kill()
            raise FederationError(f"left behind: {alive}")
        return time.monotonic() - began

    def wait(self, within_s: float) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.process.wait(within_s)
        self._file.close()
        return code

    def kill(self) -> None:
        """SIGKILL to it and all below it, as when the power goes."""
        for process in reversed(self.tree()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)
        self._file.close()


_WATCH = """
import os, sys

def _watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        target = arguments[1] if event == "socket.connect" else arguments[0]
        with open(os.environ["FEDTUNE_CONNECTIONS"], "a", encoding="utf-8") as file:
            file.write(f"{event} {target!r}\\n")

sys.addaudithook(_watch)
"""
"""Written as sitecustomize.py: every Python process below notes whom it connects to."""


_ASK = "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)"


def answers(port: int, started: Started | None, wrap: Wrap = _here) -> bool:
    """Whether all processes are up, as a health page says, which only its own place can reach.

    Raises:
        FederationError: what was started has ended.
    """
    if started is not None and started.process.poll() is not None:
        raise FederationError(f"it ended with {started.process.returncode}; see {started.log}")
    address = f"http://{HOST}:{port}/health"
    if wrap is not _here:
        words = wrap([sys.executable, "-S", "-c", _ASK, address])
        return subprocess.run(words, capture_output=True, timeout=20, check=False).returncode == 0
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Federation:
    """A coordinator and its sites, each with a home below one folder.

    Args:
        folder: empty; everything is kept below it.
        base: folder of the base model, which all sites have.
        rows: site -> its JSONL file.
        more: `coordinator` or site -> environment of its processes, beside the usual one.
        places: where they are; None: all on this machine's loopback.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        rows: Mapping[str, Path],
        more: Mapping[str, Mapping[str, str]] | None = None,
        places: Places | None = None,
    ) -> None:
        self.folder, self.base, self.rows, self.more = folder, base, dict(rows), dict(more or {})
        self.places = places
        self.host = places.address("coordinator") if places else HOST
        self.home = folder / "coordinator"
        self.connections = folder / "connections.txt"
        watched = folder / "watched"
        watched.mkdir()
        (watched / "sitecustomize.py").write_text(_WATCH, encoding="utf-8")
        self._environment = {
            "PYTHONPATH": str(watched),
            "FEDTUNE_CONNECTIONS": str(self.connections),
        }
        self.server: Started | None = None
        self._options: tuple[str, ...] = ()
        self.sites: dict[str, Started] = {}
        first, *_ = ports = free_ports(4 + 2 * len(rows))
        self.port, self.service_port, self.dashboard_port, self.health_port = ports[:4]
        self._site_ports = dict(zip(rows, zip(ports[4::2], ports[5::2], strict=True), strict=True))
        fedtune("server", "init", str(self.home), "--host", self.host, "--port", str(first))

    def __enter__(self) -> Federation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for started in [*self.sites.values(), *([self.server] if self.server else [])]:
            started.kill()

    def at(self, who: str) -> Wrap:
        """Makes of a command one that runs at `coordinator`, or at a site."""
        places = self.places
        if places is None:
            return _here
        return lambda command: places.command(who, command)

    def site_home(self, site: str) -> Path:
        return self.folder / site

    @property
    def operator(self) -> Path:
        return self.home / "operator.toml"

    def fedtune(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command as this coordinator's operator."""
        return fedtune(
            *arguments,
            check=check,
            wrap=self.at("coordinator"),
            FEDTUNE_OPERATOR=str(self.operator),
        )

    def start_server(self, *options: str) -> Started:
        """Start the coordinator, and wait until it answers; as before, where no options say how."""
        self._options = options or self._options
        arguments = ["server", "start", str(self.home), *self._options]
        self.server = Started(
            arguments,
            self.folder / "coordinator.out",
            self.at("coordinator"),
            **self._environment_of("coordinator"),
        )
        wait_for("the coordinator's health", self.healthy, 60)
        return self.server

    def _environment_of(self, who: str) -> dict[str, str]:
        return {**self._environment, **self.more.get(who, {})}

    def healthy(self) -> bool:
        """Whether all processes of the coordinator are up."""
        return answers(self.health_port, self.server, self.at("coordinator"))

    def join(self, site: str) -> None:
        """Invite a site and let it join."""
        code = json.loads(
            self.fedtune("server", "invite", site, "--dir", str(self.home), "--json").stdout
        )["code"]
        fedtune(
            "client", "join", code, "--server", f"{self.host}:{self.port}",
            "--dir", str(self.site_home(site)),
            "--data", str(self.rows[site]), "--base", str(self.base), wrap=self.at(site),
        )  # fmt: skip
        health, node = self._site_ports[site]
        self.set(site, health_port=health, node_port=node, threads=1)

    def set(self, site: str, **values: object) -> None:
        """Change keys of a site's client.toml."""
        path = self.site_home(site) / "client.toml"
        text = path.read_text(encoding="utf-8")
        for key, value in values.items():
            text, count = re.subn(rf"(?m)^#? ?{key} = .*$", f"{key} = {json.dumps(value)}", text)
            assert count == 1, (key, count)
        path.write_text(text, encoding="utf-8")

    def start_site(self, site: str, wait: bool = True) -> Started:
        """Start a site, and wait until both of its processes are up."""
        arguments = ["client", "start", str(self.site_home(site))]
        self.sites[site] = Started(
            arguments, self.folder / f"{site}.out", self.at(site), **self._environment_of(site)
        )
        if wait:
            self.wait_for_site(site)
        return self.sites[site]

    def wait_for_site(self, site: str, within_s: float = 60) -> None:
        port = self._site_ports[site][0]

        def up() -> bool:
            return answers(port, self.sites[site], self.at(site))

        wait_for(f"{site}'s health", up, within_s)

    def start_all(self, *options: str) -> None:
        """The coordinator, and all sites, which join first."""
        self.start_server(*options)
        for site in self.rows:
            self.join(site)
        for site in self.rows:
            self.start_site(site, wait=False)
        for site in self.rows:
            self.wait_for_site(site)

    def hand_in(self, tree: Mapping[str, object]) -> str:
        """Hand in a run file; the name of its run."""
        name = str(tree["run"]["name"])  # type: ignore[index]
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(tree), encoding="utf-8")
        self.fedtune("run", str(path), "--detach")
        return name

    def run_folder(self, name: str) -> Path:
        return self.home / "runs" / name

    def state(self, name: str) -> Mapping[str, object]:
        """What `fedtune ps` says of a run."""
        for line in self.fedtune("ps", "--json").stdout.splitlines():
            found = json.loads(line)
            if isinstance(found, dict) and found.get("name") == name:
                return found
        return {}

    def events(self, name: str, kind: str = "") -> list[dict[str, object]]:
        """The ledger's events; those of one kind."""
        path = self.run_folder(name) / "ledger.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if not kind or event.get("kind") == kind]

    def wait_for_event(
        self,
        name: str,
        kind: str,
        wanted: Callable[[Mapping[str, object]], bool] = lambda event: True,
        within_s: float = 60,
    ) -> None:
        """Return once the ledger holds such an event."""
        wait_for(f"{kind} of {name}", lambda: any(map(wanted, self.events(name, kind))), within_s)

    def wait_until_ended(self, name: str, within_s: float) -> Mapping[str, object]:
        """What the run came to; it must end within the time."""
        found: Mapping[str, object] = {}

        def ended() -> bool:
            nonlocal found
            found = self.state(name)
            return found.get("state") in ("finished", "failed", "stopped")

        wait_for(f"the end of {name}", ended, within_s, every_s=1.0)
        return found

    def other_hosts(self) -> list[str]:
        """Connections and look-ups of any process that were not to this machine."""
        if not self.connections.exists():
            raise FederationError("no process noted its connections")
        lines = set(self.connections.read_text(encoding="utf-8").splitlines())
        allowed = re.compile(_LOCAL.format(coordinator=re.escape(self.host)))
        return sorted(line for line in lines if not allowed.search(line))

    def stop_all(self) -> float:
        """End everything in order; the longest that one took, in seconds."""
        took = [site.stop() for site in self.sites.values()]
        self.sites = {}
        if self.server is not None:
            took.append(self.server.stop())
            self.server = None
        return max(took)


@contextmanager
def federation(
    folder: Path,
    base: Path,
    rows: Mapping[str, Path],
    *options: str,
    places: Places | None = None,
) -> Iterator[Federation]:
    """A federation with all sites started, ended at the end.

    Args:
        options: of `fedtune server start`.
    """
    with Federation(folder, base, rows, places=places) as started:
        started.start_all(*options)
        yield started
