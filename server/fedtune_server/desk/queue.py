"""The runs that are wanted, one file each: what a restart of the coordinator goes on with.

    HOME/queue/NAME.json  {"name", "config_json", "wanted", "ended", "reason", "flower_run_id", ...}

A file is replaced whole, so that a reader finds the old one or the new one. The desk alone writes;
the process that plays a run reads its configuration here.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, cast, get_args

from fedtune.config import parse_run_config
from fedtune.errors import ConfigError, RunError
from fedtune.settings import RunConfig
from fedtune.wire.durable import write_durably

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of runs, which are names of files too."""

Ended = Literal["", "finished", "failed", "stopped"]


class UnknownRunError(RunError):
    """Nobody asked for a run of that name."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that somebody asked for, and how far it came.

    Attributes:
        config_json: its whole RunConfig; `outputs.folder` is the run's folder.
        since: when it was asked for, UTC, ISO 8601; runs are played in this order.
        wanted: `stopped`: the operator does not want it to go on.
        ended: how it ended; empty while it is played or waits.
        reason: why it failed, stopped or waits; empty otherwise.
        flower_run_id: the Flower run that plays it now or played it last.
        started_with: what `status.json` looked like when that Flower run was started.
        started_round: the round that was saved then.
        restarts: Flower runs after the first.
        fruitless: the last of them in a row that saved no round.
    """

    name: str
    config_json: str
    since: str
    wanted: Literal["running", "stopped"] = "running"
    ended: Ended = ""
    reason: str = ""
    flower_run_id: int | None = None
    started_with: str = ""
    started_round: int = 0
    restarts: int = 0
    fruitless: int = 0

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise RunError(
                f"run.name {self.name[:100]!r}: expected at most 100 letters, digits, '.', '_' and "
                "'-', of which a letter or digit first"
            )

    def config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            ConfigError: it is not one; this version of fedtune may have other keys.
        """
        return read_config(self.config_json)


def read_config(config_json: str) -> RunConfig:
    """A configuration that was sent or kept as JSON.

    Raises:
        ConfigError: it is not JSON, or holds an unknown key or a bad value.
    """
    try:
        tree = json.loads(config_json)
    except (ValueError, RecursionError):
        raise ConfigError("the run's configuration is not valid JSON; send it again") from None
    if not isinstance(tree, dict):
        raise ConfigError("the run's configuration must be a JSON object of sections")
    return parse_run_config(tree, "the run's configuration")


class Queue:
    """The folder of the runs that are wanted.

    Attributes:
        lock: for who reads a run and writes what follows from it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lock = threading.RLock()

    def get(self, name: str) -> Wanted | None:
        """A run by its name; None: nobody asked for it.

        Raises:
            RunError: its file is damaged.
        """
        if not RUN_NAME.fullmatch(name):
            return None
        path = self._folder / f"{name}.json"
        try:
            return _parsed(path, path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror})") from None

    def need(self, name: str) -> Wanted:
        """A run by its name.

        Raises:
            UnknownRunError: nobody asked for it.
            RunError: its file is damaged.
        """
        found = self.get(name)
        if found is None:
            raise UnknownRunError(
                f"no run is called {name[:100]!r} here; fedtune ps lists the runs"
            )
        return found

    def all(self) -> list[Wanted]:
        """Every run, the one that was asked for first in front.

        Raises:
            RunError: a file is damaged; it is named.
        """
        names = sorted(path.stem for path in self._folder.glob("*.json"))
        found = (self.get(name) for name in names)
        return sorted((run for run in found if run is not None), key=lambda run: run.since)

    def put(self, run: Wanted) -> None:
        """Write a run's file, whole or not at all.

        Raises:
            RunError: the disk is full or cannot be written; what was there stays.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(run), ensure_ascii=False, indent=1)
        write_durably(self._folder / f"{run.name}.json", text.encode("utf-8"))

    def change(self, name: str, **changes: object) -> Wanted:
        """Replace some fields of a run and write it; the new one.

        Raises:
            RunError: nobody asked for it, or it cannot be written.
        """
        with self.lock:
            run = replace(self.need(name), **changes)  # type: ignore[arg-type]  # its own fields
            self.put(run)
        return run


def _parsed(path: Path, content: bytes) -> Wanted:
    known = {field.name for field in fields(Wanted)}
    try:
        tree = json.loads(content)
        run = Wanted(**{key: value for key, value in tree.items() if key in known})
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise RunError(f"{path} is not a run's file; remove it, and send the run again") from None
    if run.name != path.stem or not _right(run):
        raise RunError(f"{path} is not the file of a run; remove it, and send the run again")
    return run


def _right(run: Wanted) -> bool:
    texts = (run.config_json, run.since, run.reason, run.started_with)
    counts = (run.started_round, run.restarts, run.fruitless)
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(count, int) for count in counts)
        and run.wanted in ("running", "stopped")
        and run.ended in get_args(Ended)
        and isinstance(cast(object, run.flower_run_id), (int, type(None)))
    )
