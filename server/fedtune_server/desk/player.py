"""Plays the runs that are wanted, one after another, as Flower runs that end and start anew.

A Flower run is a process that plays a run of ours; the run itself is its folder. So a process that
died is started again and goes on from the folder, and a run of ours has as many Flower runs as it
takes. One run is played at a time: a device takes one message at a time, and two runs would only
wait for each other.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fedtune.deploy.site_task import flower_config
from fedtune.errors import ConfigError, FedtuneError
from fedtune.wire.ledger_chain import parsed
from fedtune_server.desk.queue import Queue, Wanted

_MOST_FRUITLESS = 20
_LONGEST_PAUSE_S = 60.0
_POLL_S = 1.0
_UNWRITTEN_S = 30.0
_TAIL_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class FlowerRun(Protocol):
    """What Flower tells of one of its runs; a subset of `flwr_compat.FlowerRun`."""

    @property
    def status(self) -> str: ...
    @property
    def sub_status(self) -> str: ...
    @property
    def details(self) -> str: ...
    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...


class FlowerControl(Protocol):
    """What is asked of Flower; `flwr_compat.Control` does it."""

    def start_run(self, fab: bytes) -> int: ...
    def stop_run(self, run_id: int) -> None: ...
    def runs(self) -> Mapping[int, FlowerRun]: ...


class Player:
    """Brings what runs in line with what is wanted, a step at a time.

    Everything that it goes by is on disk or asked of Flower, so that a new one takes over from
    one that was killed at any point.

    Args:
        control: asks Flower; any call may raise DeploymentError while the link is away.
        make_fab: the app that a Flower run is started with, from its configuration.
        now: a clock in seconds that only moves forward.
    """

    def __init__(
        self,
        queue: Queue,
        runs: Path,
        control: FlowerControl,
        make_fab: Callable[[Mapping[str, str]], bytes],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue, self._runs, self._control, self._make_fab = queue, runs, control, make_fab
        self._now = now
        self._not_before: dict[str, float] = {}
        self._wake = threading.Event()
        self._closed = False
        self.flower: Mapping[int, FlowerRun] = {}
        self.trouble = ""

    def wake(self) -> None:
        """Have the next step done at once."""
        self._wake.set()

    def close(self) -> None:
        """End `play`."""
        self._closed = True
        self._wake.set()

    def play(self) -> None:
        """Step until closed; a link that does not answer is asked again."""
        while not self._closed:
            try:
                self.step()
                self.trouble = ""
            except FedtuneError as error:
                if str(error) != self.trouble:
                    _log.warning("runs wait: %s", error)
                self.trouble = str(error)
            except Exception:  # noqa: BLE001  the edge of a thread, without which nothing is played
                _log.exception("a fault while runs were looked at")
                self.trouble = "a fault at the coordinator; see its logs/desk.log"
            self._wake.wait(_POLL_S)
            self._wake.clear()

    def step(self) -> None:
        """Look once, and do what is needed: end, stop and start runs.

        Raises:
            DeploymentError: Flower does not answer; nothing is lost by asking again.
            RunError: a run's file is damaged or cannot be written.
        """
        flower = self._control.runs()
        self.flower = flower
        wanted = self._queue.all()
        for run in wanted:
            if not run.ended:
                self._look_at(run, flower)
        if not self._stop_strangers(wanted, flower):
            self._start_next(flower)

    # ------------------------------------------------------------ what goes on

    def _look_at(self, run: Wanted, flower: Mapping[int, FlowerRun]) -> None:
        plays = _is_live(run, flower)
        if run.wanted == "stopped":
            if plays and run.flower_run_id is not None:
                self._control.stop_run(run.flower_run_id)
            else:
                self._end(run, "stopped", run.reason or "the operator stopped it")
        elif run.flower_run_id is not None and not plays:
            self._judge(run, flower.get(run.flower_run_id))

    def _judge(self, run: Wanted, ended: FlowerRun | None) -> None:
        """Say what the end of a Flower run means: the run's end, or that it is started again."""
        folder = self._runs / run.name
        status = read_status(folder)
        spoke = _mark(folder) != run.started_with
        state = status.get("state") if spoke else None
        if state == "finished":
            self._end(run, "finished", "")
            return
        reason = _failure(folder) if state == "failed" else ""
        if reason and not _is_fault(reason):
            self._end(run, "failed", reason)
            return
        words = reason or (ended.details if ended is not None else "") or "its process ended"
        fruitless = 0 if _round(status) > run.started_round else run.fruitless + 1
        if fruitless >= _MOST_FRUITLESS:
            self._end(
                run,
                "failed",
                f"its process ended {fruitless} times in a row without saving a round, last: "
                f"{words}; see logs/runner.log at the coordinator, then: fedtune resume {run.name}",
            )
            return
        pause = 0.0 if fruitless == 0 else min(_LONGEST_PAUSE_S, 2.0 ** (fruitless - 1))
        self._not_before[run.name] = self._now() + pause
        self._queue.change(
            run.name,
            flower_run_id=None,
            restarts=run.restarts + 1,
            fruitless=fruitless,
            reason=f"started again: {_line(words)}",
        )
        _log.warning("run %s is started again in %.0f s: %s", run.name, pause, words)

    def _end(self, run: Wanted, ended: str, reason: str) -> None:
        self._queue.change(run.name, ended=ended, reason=_line(reason))
        _log.info("run %s: %s %s", run.name, ended, reason)

    # ------------------------------------------------------------ what is to go on

    def _stop_strangers(self, wanted: list[Wanted], flower: Mapping[int, FlowerRun]) -> bool:
        """Stop Flower runs that no run of ours has; whether there were any.

        One is left where the desk was killed between starting it and writing its id down. It is
        stopped, not adopted, because nothing tells whose it is; its run goes on from the folder.
        """
        ours = {run.flower_run_id for run in wanted if not run.ended}
        strangers = [i for i, run in flower.items() if _live(run) and i not in ours]
        for run_id in strangers:
            _log.warning("Flower run %d is not one that is wanted; it is stopped", run_id)
            self._control.stop_run(run_id)
        return bool(strangers)

    def _start_next(self, flower: Mapping[int, FlowerRun]) -> None:
        waiting = [run for run in self._queue.all() if not run.ended]
        if not waiting or any(_is_live(run, flower) for run in waiting):
            return
        run = waiting[0]
        if run.flower_run_id is not None or self._now() < self._not_before.get(run.name, 0.0):
            return
        folder = self._runs / run.name
        status = read_status(folder)
        mark, reached = _mark(folder), _round(status)
        try:
            config = run.config()
        except ConfigError as error:
            self._end(run, "failed", str(error))
            return
        if status.get("state") == "finished" and reached >= config.run.rounds:
            self._end(run, "finished", "")  # by a process whose end nobody saw
            return
        fab = self._make_fab(flower_config(config))
        # Where its id cannot be written down, such as on a full disk, it is a stranger at the next
        # step, and the next one is not started at once.
        self._not_before[run.name] = self._now() + _UNWRITTEN_S
        run_id = self._control.start_run(fab)
        self._queue.change(run.name, flower_run_id=run_id, started_with=mark, started_round=reached)
        self._not_before.pop(run.name, None)
        _log.info("run %s is played as Flower run %d", run.name, run_id)


def _live(run: FlowerRun) -> bool:
    return run.status != "finished"


def _is_live(run: Wanted, flower: Mapping[int, FlowerRun]) -> bool:
    found = flower.get(run.flower_run_id) if run.flower_run_id is not None else None
    return found is not None and _live(found)


# ---------------------------------------------------------------- what a run's folder says


def read_status(folder: Path) -> Mapping[str, object]:
    """The run folder's status.json, leniently; empty where there is none."""
    try:
        tree = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _round(status: Mapping[str, object]) -> int:
    found = status.get("round")
    return found if isinstance(found, int) and found >= 0 else 0


def _mark(folder: Path) -> str:
    """What changes when somebody writes the run's status; empty where there is none."""
    try:
        stat = (folder / "status.json").stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns}:{stat.st_ino}"


def _failure(folder: Path) -> str:
    """The reason of the ledger's last `run_failed`; empty where it has none."""
    try:
        with (folder / "ledger.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return ""
    for line in reversed(lines):
        if b"run_failed" in line:
            found = parsed(line)
            if found is not None and found.get("kind") == "run_failed":
                return str(found.get("reason", ""))
    return ""


_REPR = re.compile(r"[A-Za-z_][\w.]*\(.*\)", re.DOTALL)


def _is_fault(reason: str) -> bool:
    """Whether a run's last words are a fault such as a lost connection, not a FedtuneError.

    A FedtuneError is written as its text, which a person can act on; another exception as its
    repr, and another try may go better.
    """
    return _REPR.fullmatch(reason) is not None


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:1000]
