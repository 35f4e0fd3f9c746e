"""The folder that is a run: where each file of it lies, and who may write there.

    config.json  plan.json  distortion.json  labels.json  status.json  ledger.jsonl  metrics.jsonl
    report.html  .lock
    tensorboard/  checkpoints/round-0007.safetensors  open/  devices/  exports/merged  ...

A file that is replaced is written to a temporary name, flushed to the disk and renamed, so that a
reader finds the old one or the new one and never a part.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, cast, get_args

from fedtune.errors import RunError
from fedtune.settings import RunConfig
from fedtune.wire.durable import write_durably, writing
from fedtune.wire.events import plain
from fedtune_server.folder_lock import FolderLock
from fedtune_server.ledger import last_run
from fedtune_server.same_run import first_difference, notes, written_config

RunState = Literal["running", "finished", "interrupted", "failed"]

_FILES = (
    "config.json",
    "plan.json",
    "distortion.json",
    "importance.json",
    "labels.json",
    "status.json",
    "ledger.jsonl",
    "metrics.jsonl",
    "report.html",
    "tensorboard/events.out.tfevents.*",
    "checkpoints/round-*.safetensors",
    "checkpoints/round-*.safetensors.sha256",
    "checkpoints/*.partial",
    "checkpoints/*.damaged",
    "*.json.partial",
    "exports/model.onnx*",
)
_FOLDERS = ("exports", "checkpoints", "tensorboard", "open", "devices")
_WHOLE_FOLDERS = (
    "open/round-*",
    "devices/*",
    "exports/merged",
    "exports/peft",
    "exports/.*.partial",
    "exports/.*.old",
)
"""All that a run writes: patterns of its files and folders, and of folders that it owns whole."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is.

    Attributes:
        round: last round that was joined and saved; 0 before the first.
        updated: when this was written, UTC, ISO 8601.
        run: the run's id; empty before it has one.
    """

    state: RunState
    round: int
    updated: str
    run: str = ""


class RunFolder:
    """A run's folder, held by this process until it is closed.

    Use `RunFolder.enter` to start a run or to continue it, `RunFolder.create` for a new one; to
    read only, the paths can be used without a lock: `RunFolder(path)`.

    Attributes:
        run: the run's id, once it has one.
        reached: last round that was joined and saved.
        notes: what a person should know of how the run goes on, one line each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ""
        self.reached = 0
        self.notes: tuple[str, ...] = ()
        self._lock: FolderLock | None = None

    @classmethod
    def enter(cls, path: Path, config: RunConfig, overwrite: bool = False) -> RunFolder:
        """Lock the folder of a run, made anew unless it holds that run, unfinished.

        `config.json` then holds the configuration. A run that ended in words before its first
        round was saved makes place for one of another configuration.

        Args:
            overwrite: first remove what an earlier run left there, and only that.

        Raises:
            RunError: the folder holds another run, or a finished one; another coordinator uses it;
                or it cannot be written.
        """
        folder = cls._locked(path)
        try:
            if overwrite or not folder._continues(config):
                folder._remove_run()
            else:
                folder._take_over()
            folder.write_json("config.json", config.model_dump(mode="json"))
            folder._begin()
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> RunFolder:
        """Make the folder of a new run and lock it.

        Args:
            path: is created with its parents; other files that are in it stay as they are.
            overwrite: first remove what an earlier run left there, and only that. A run that
                ended before its first round was saved is replaced without it.

        Raises:
            RunError: the folder holds a run, or another coordinator uses it.
        """
        folder = cls._locked(path)
        try:
            if overwrite or folder._holds_nothing_to_lose():
                folder._remove_run()
            elif folder.holds_run:
                raise RunError(
                    f"{path} already holds a run ({folder._described_state()}); choose another "
                    "outputs.folder, or pass --overwrite to replace it"
                )
            folder._begin()
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def _locked(cls, path: Path) -> RunFolder:
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"run folder {path} cannot be created ({error.strerror}); "
                "choose another outputs.folder"
            ) from None
        folder._lock = FolderLock.acquire(path)
        return folder

    def _continues(self, config: RunConfig) -> bool:
        """Whether the run that is here is this one; False where there is none to lose."""
        if not self.holds_run:
            return False
        written = written_config(self.config)
        if written is None and not any(self.checkpoints.glob("round-*")):
            return False  # killed before it had written anything else
        difference = first_difference(written, config) if written is not None else None
        if difference is None and written is not None:
            self._refuse_finished(config.run.rounds)
            self.notes = notes(written, config)
            return True
        if self._holds_nothing_to_lose():
            return False
        other = f" with {difference.words()}" if difference is not None else ""
        raise RunError(
            f"{self.path} already holds a run ({self._described_state()}){other}; undo the change "
            "to continue it, choose another outputs.folder, or pass --overwrite to replace it"
        )

    def _refuse_finished(self, rounds: int) -> None:
        """Refuse to continue a run that has nothing left to do, or has gone further."""
        try:
            status = self.read_status()
        except RunError:
            return  # the checkpoints know how far it is
        if status.round > rounds:
            raise RunError(
                f"{self.path} already holds a run ({self._described_state()}), more than "
                f"run.rounds = {rounds}; raise it to {status.round} or more, or pass --overwrite "
                "to replace the run"
            )
        if status.state == "finished" and status.round == rounds:
            raise RunError(
                f"{self.path} already holds a run ({self._described_state()}); raise run.rounds to "
                "continue it, choose another outputs.folder, or pass --overwrite to replace it"
            )

    def _take_over(self) -> None:
        """Go on from the status that the last coordinator left; the ledger knows its run, too."""
        try:
            status = self.read_status()
            self.run, self.reached = status.run, status.round
        except RunError:
            self.run = last_run(self.ledger)

    def _begin(self) -> None:
        for below in (self.checkpoints, self.exports):
            with writing(below):
                below.mkdir(exist_ok=True)
        self.write_status("running", self.reached)

    def close(self) -> None:
        """Let other coordinators use the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------ where things are

    @property
    def config(self) -> Path:
        """The run's whole effective configuration."""
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        """What each device does in a round."""
        return self.path / "plan.json"

    @property
    def status(self) -> Path:
        """How far the run is."""
        return self.path / "status.json"

    @property
    def ledger(self) -> Path:
        """Every event, one JSON line each, hash-chained."""
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """Numbers per device and round, one JSON line each."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the coordinator's state after each of the last rounds."""
        return self.path / "checkpoints"

    @property
    def open_rounds(self) -> Path:
        """Folder of the updates that came in rounds that have not closed."""
        return self.path / "open"

    @property
    def exports(self) -> Path:
        """Folder of the merged model and the adapter."""
        return self.path / "exports"

    @property
    def report(self) -> Path:
        """The run as a page to read."""
        return self.path / "report.html"

    @property
    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any(path.exists() for path in (self.status, self.config, self.ledger))

    def write_json(self, name: str, value: object) -> Path:
        """Replace one JSON file of the folder, all or nothing; its path."""
        path = self.path / name
        write_json(path, value)
        return path

    # ------------------------------------------------------------ status

    def write_status(self, state: RunState, round: int) -> None:
        """Record how far the run is; all or nothing."""
        updated = datetime.now(UTC).isoformat(timespec="seconds")
        tree = {"state": state, "round": round, "updated": updated, "run": self.run}
        write_json(self.status, tree)
        self.reached = round

    def write_ending(self, state: RunState) -> None:
        """Record how this process's part of the run ended."""
        self.write_status(state, self.reached)

    def read_status(self) -> RunStatus:
        """How far the run is.

        Raises:
            RunError: there is no status file, or it is not one.
        """
        try:
            tree = json.loads(self.status.read_text(encoding="utf-8"))
            state, round, updated = tree["state"], int(tree["round"]), str(tree["updated"])
            run = str(tree.get("run", ""))
        except OSError as error:
            raise RunError(f"{self.status} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{self.status} is not a status file; the run is damaged") from None
        if state not in get_args(RunState):
            raise RunError(
                f"{self.status}: expected state {', '.join(get_args(RunState))}, got {state!r}"
            )
        return RunStatus(cast(RunState, state), round, updated, run)

    def _holds_nothing_to_lose(self) -> bool:
        """Whether a run failed or was interrupted here before it had joined anything."""
        rounds = (path.name for path in self.checkpoints.glob("round-*"))
        if not self.status.exists() or any(not name.startswith("round-0000.") for name in rounds):
            return False
        try:
            return self.read_status().state in ("failed", "interrupted")
        except RunError:
            return False  # a damaged status tells nothing; keep what is there

    def _described_state(self) -> str:
        try:
            status = self.read_status()
        except RunError:
            return "its state is unknown"
        return f"{status.state} at round {status.round}"

    # ------------------------------------------------------------ overwriting

    def _remove_run(self) -> None:
        for pattern in _WHOLE_FOLDERS:
            for below in self.path.glob(pattern):
                if below.is_dir() and not below.is_symlink():
                    shutil.rmtree(below)
        for pattern in _FILES:
            for file in self.path.glob(pattern):
                file.unlink()
        for name in _FOLDERS:
            below = self.path / name
            if below.is_dir() and not below.is_symlink() and not any(below.iterdir()):
                below.rmdir()


def write_json(path: Path, value: object) -> None:
    """Replace a file with a JSON value; a reader finds the old one or the new one, whole.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_durably(path, text.encode("utf-8"))
