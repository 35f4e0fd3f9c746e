"""The ServerApp of a deployment: plays the run that its Flower run names.

Flower's run carries a name and what sites need to know; everything else comes from the
coordinator's home: the run's settings from `queue/NAME.json`, the sites from the registry. The
run's folder is `runs/NAME`. A run whose process died is played by the next one from where it was.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import httpx
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.config import cache_folder, coordinator_home, parse_run_config
from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.mailbox import Mailbox
from fedtune.deploy.site_task import RUN_KEY
from fedtune.errors import ConfigError, FedtuneError, RunError, StoppedError
from fedtune.flwr_compat import absence
from fedtune.model.shapes import read_shapes
from fedtune.model.source import resolve_model
from fedtune.records import DistortionTable, Event, MatrixForm, ModelShapes
from fedtune.settings import RunConfig
from fedtune_server.clock import LinkClock
from fedtune_server.coordinator import Coordinator
from fedtune_server.deployed_config import deployed_config
from fedtune_server.distortion import Measure
from fedtune_server.hierarchy.below import answer_above
from fedtune_server.playing import Watcher, play_run
from fedtune_server.registry import Registry
from fedtune_server.roster import ALL_SITES, Registered

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_BYTES = 4_000_000
"""Of a queue file; a run file with a thousand sites has 100 kB."""

_TOLD = ("round", "device", "devices", "reason", "text", "here", "missing", "seconds")
"""Fields of events that go to the process's log; the ledger has them all."""

_log = logging.getLogger(__name__)

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Play the run that Flower's run configuration names."""
    home = CoordinatorHome(coordinator_home())
    play_deployed(grid, home, run_name(context.run_config), finish=_entry("finish_deployed_run"))


class Directory(Protocol):
    """What a run asks the registry of sites."""

    def sites(self) -> Mapping[str, Any]:
        """Name -> a site, whose `state` is `enrolled` if it may connect."""
        ...

    def name_of_node(self, node_id: int) -> str | None:
        """The site that Flower knows by this number."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """A run that is wanted.

    Attributes:
        stopped: the operator does not want it to go on.
    """

    config: RunConfig
    stopped: bool


def run_name(run_config: Mapping[str, object]) -> str:
    """The name of the run that a Flower run plays.

    Raises:
        ConfigError: it is none of fedtune's.
    """
    name = run_config.get(RUN_KEY)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"expected the name of a run under {RUN_KEY}, found {str(name)[:100]!r}; start runs "
            "with fedtune run"
        )
    return name


def play_deployed(
    grid: Grid,
    home: CoordinatorHome,
    name: str,
    *,
    finish: Callable[[RunConfig, Path, Watcher], None],
    directory: Directory | None = None,
) -> Path:
    """Play a run of the queue, or what is left of it, on real sites; its folder.

    A run of a group plays what the level above asks instead (`deployment.group`).

    Args:
        finish: writes the exports.
        directory: the registry of sites; default: that of the home.

    Raises:
        StoppedError: the operator stopped it, this process was told to end, or the link is gone;
            the folder says `interrupted`, and the run can go on.
        FedtuneError: the run cannot be played; its folder says why, if it has one.
    """
    order = _check_wanted(home, name)
    config = deployed_config(order.config, home.runs / name)
    model = resolve_model(config.model.path, config.model.revision)
    shapes = read_shapes(model, config.lora.targets, cache_folder() / "digests")
    roster = registered(config, directory or _registry(home))
    group = config.deployment.group

    def rounds(coordinator: Coordinator) -> None:
        with _named_ends(home, name):
            coordinator.run(grid, roster)

    try:
        with _ended_by_signal():
            if group:
                mailbox, wanted = Mailbox(home.group(group)), partial(_check_wanted, home, name)
                with _named_ends(home, name):
                    return answer_above(config, shapes, grid, roster, mailbox, _tell, wanted)
            return play_run(
                config,
                shapes,
                roster.expected,
                rounds=rounds,
                watch=_tell,
                finish=partial(finish, config),
                measure=_measure(model, shapes),
                clock=LinkClock(absence(grid)),
            )
    except KeyboardInterrupt:
        if read_order(home, name).stopped:
            raise StoppedError(f"the operator stopped run {name}") from None
        raise StoppedError(
            f"the process that played run {name} was told to end; the run goes on when it is "
            "started again"
        ) from None


def registered(config: RunConfig, directory: Directory) -> Registered:
    """The sites of a run, by the registry."""
    deployment = config.deployment

    def enrolled() -> frozenset[str]:
        sites = directory.sites()
        return frozenset(name for name, site in sites.items() if site.state == "enrolled")

    return Registered(
        sites=tuple(deployment.sites),
        enrolled=enrolled,
        name_of_node=directory.name_of_node,
        minimum=deployment.minimum,
        least=config.run.minimum_devices if ALL_SITES in deployment.sites else 1,
        patience_s=deployment.deadline_s,
    )


def read_order(home: CoordinatorHome, name: str) -> Order:
    """A run of the queue.

    Raises:
        RunError: nobody asked for it, or its file is damaged.
        ConfigError: its settings are not right.
    """
    path = home.queue / f"{name}.json"
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        tree = json.loads(content)
        config = json.loads(tree["config_json"])
        stopped = tree.get("wanted") == "stopped"
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); start the run again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RunError(f"{path} is not a run's file; start the run again") from None
    if not isinstance(config, dict):
        raise RunError(f"{path}: config_json must hold an object of sections")
    found = parse_run_config(config, str(path))
    if found.run.name != name:
        raise RunError(f"{path} holds run {found.run.name!r}; start the run again")
    return Order(found, stopped)


def _check_wanted(home: CoordinatorHome, name: str) -> Order:
    """A run of the queue, as `read_order`.

    Raises:
        StoppedError: the operator stopped it. Between questions of the level above nothing else
            would tell a group's run so for up to 30 s, until its next heartbeat.
    """
    order = read_order(home, name)
    if order.stopped:
        raise StoppedError(f"run {name} was stopped; fedtune resume {name} goes on with it")
    return order


@contextmanager
def _named_ends(home: CoordinatorHome, name: str) -> Iterator[None]:
    """Let what Flower raises when a run is stopped, or its link is gone, say what it is."""
    try:
        yield
    except FedtuneError:
        raise
    except Exception as error:
        if read_order(home, name).stopped:
            raise StoppedError(f"the operator stopped run {name}") from error
        if isinstance(error, httpx.HTTPError):
            raise StoppedError(
                f"Flower's link does not take part any more ({error}); run {name} goes on when it "
                "is started again"
            ) from error
        raise


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGTERM end a run like Ctrl-C does, so that its folder says so.

    Who started this process may have seen to that, and to a process that does not end; that stays.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    own_thread = threading.current_thread() is threading.main_thread()
    if not own_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(event: Event) -> None:
    shown = {key: event.fields[key] for key in _TOLD if key in event.fields}
    _log.info("%s %s", event.kind, json.dumps(shown, default=str)[:1000])


def _registry(home: CoordinatorHome) -> Directory:
    return Registry(home.registry)


def _measure(model: Path, shapes: ModelShapes) -> Measure | None:
    """Measures the base, where this machine has torch; the coordinator itself never imports it."""
    if find_spec("torch") is None:
        return None

    def measure(forms: Sequence[MatrixForm], emit: Watcher) -> DistortionTable:
        table: DistortionTable = _entry("measure_base")(model, shapes, forms, emit)
        return table

    return measure


def _entry(name: str) -> Any:  # entry points are untyped
    found = entry_points(group="fedtune.apps", name=name)
    if not found:
        raise RunError(f"fedtune is not installed whole: no entry point {name!r}; install it again")
    return next(iter(found)).load()
