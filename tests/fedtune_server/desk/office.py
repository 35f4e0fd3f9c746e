"""A desk on loopback with a fake Flower and a fake registry: what its tests talk to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.config import parse_run_config
from fedtune.deploy.channel import open_channel
from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.errors import DeploymentError
from fedtune.settings import RunConfig
from fedtune_server.dashboard.feed import Readings
from fedtune_server.dashboard.metrics import own_metrics
from fedtune_server.desk.assembly import Parts, assemble, serve

OPERATOR_TOKEN = "the-operator"


@dataclass
class FakeSite:
    name: str
    state: str = "enrolled"
    token: str = ""


@dataclass
class FakeRegistry:
    known: dict[str, FakeSite] = field(default_factory=dict)

    def add(self, name: str, state: str = "enrolled") -> str:
        self.known[name] = FakeSite(name, state, f"token-of-{name}")
        return self.known[name].token

    def sites(self) -> Mapping[str, FakeSite]:
        return dict(self.known)

    def by_token(self, token: str) -> FakeSite | None:
        return next((site for site in self.known.values() if site.token == token), None)


@dataclass
class FakeRun:
    status: str = "running"
    sub_status: str = ""
    details: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0


class FakeFlower:
    """Starts runs that do nothing until a test ends them."""

    def __init__(self) -> None:
        self.known: dict[int, FakeRun] = {}
        self.started: list[str] = []
        self.away = False
        self.most_at_once = 0

    def start_run(self, fab: bytes) -> int:
        self._answer()
        run_id = 100 + len(self.known)
        self.known[run_id] = FakeRun()
        self.started.append(json.loads(fab)["fedtune-run"])
        live = sum(run.status != "finished" for run in self.known.values())
        self.most_at_once = max(self.most_at_once, live)
        return run_id

    def stop_run(self, run_id: int) -> None:
        self._answer()
        self.end(run_id, "stopped")

    def runs(self) -> Mapping[int, FakeRun]:
        self._answer()
        return dict(self.known)

    def end(self, run_id: int, sub_status: str = "failed", details: str = "") -> None:
        self.known[run_id] = FakeRun("finished", sub_status, details, 10, 20)

    def _answer(self) -> None:
        if self.away:
            raise DeploymentError("Flower's link does not answer")


def fab(config: Mapping[str, str]) -> bytes:
    return json.dumps(dict(config)).encode()


def config(name: str = "demo", **sections: dict[str, Any]) -> RunConfig:
    """A run of two sites; other keys by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": name, "rounds": 3},
        "model": {"path": "org/base"},
        "data": {},
        "deployment": {"sites": ["north", "south"], "minimum": 1},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return parse_run_config(tree, "the test")


def write_status(folder: Path, state: str, round: int, run: str = "r1") -> None:
    """What a run's process writes; the file's place on disk changes as it really does."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"state": state, "round": round, "updated": "2026-11-27T12:00:00+00:00", "run": run}
    new = folder / "status.json.partial"
    new.write_text(json.dumps(tree))
    new.replace(folder / "status.json")


def write_ledger(folder: Path, *events: dict[str, Any]) -> None:
    """Append events to a run's ledger."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


@dataclass
class Office:
    """A desk that answers.

    Attributes:
        address: HOST:PORT.
    """

    parts: Parts
    registry: FakeRegistry
    flower: FakeFlower
    address: str
    ca: bytes
    insecure: bool

    @contextmanager
    def channel(self, token: str = OPERATOR_TOKEN) -> Iterator[Any]:
        channel = open_channel(self.address, self.ca, token, insecure=self.insecure)
        try:
            yield channel
        finally:
            channel.close()

    def folder(self, name: str) -> Path:
        return self.parts.home.runs / name


def make_home(path: Path) -> CoordinatorHome:
    home = CoordinatorHome(path)
    home.path.mkdir(parents=True, exist_ok=True)
    home.operator_file.write_text(f'token = "{OPERATOR_TOKEN}"\n')
    return home


@contextmanager
def opened_office(path: Path, ca: bytes = b"", port: int = 0, **settings: Any) -> Iterator[Office]:
    """A desk on a free port, in a thread, ended with the context.

    Args:
        ca: PEM; empty: without TLS. The home has the certificate then.
    """
    home = make_home(path)
    registry, flower = FakeRegistry(), FakeFlower()
    for name in ("north", "south"):
        registry.add(name)
    asked = ServerSettings(host="localhost", bind="127.0.0.1", **settings)
    asked = asked.model_copy(update={"service_port": port})  # 0: a free one
    parts = assemble(home, asked, registry, flower, fab)
    ports: list[int] = []
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def run() -> None:
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(event.set))

        def told(found: int) -> None:
            ports.append(found)
            ready.set()

        readings = Readings(parts.desk, home.certificate, home.logs / "supervisor.json")
        metrics = partial(own_metrics, readings)
        await serve(parts, event, insecure=not ca, opened=told, metrics=metrics)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(10), "the desk did not open its port"
    try:
        yield Office(parts, registry, flower, f"localhost:{ports[0]}", ca, not ca)
    finally:
        stop[0]()
        thread.join(10)
        assert not thread.is_alive(), "the desk did not end"


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)
