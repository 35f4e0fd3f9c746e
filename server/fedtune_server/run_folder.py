"""The folder that is a run: where each file of it lies, and who may write there.

    config.json  plan.json  distortion.json  labels.json  status.json  ledger.jsonl  metrics.jsonl
    report.html  .lock
    tensorboard/  checkpoints/round-0007.safetensors  exports/merged  exports/peft  ...

A file that is replaced is written to a temporary name, flushed to the disk and renamed, so that a
reader finds the old one or the new one and never a part.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, cast, get_args

from fedtune.errors import RunError
from fedtune.wire.events import plain
from fedtune_server.folder_lock import FolderLock

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
    "exports/model.onnx*",
)
_FOLDERS = ("exports", "checkpoints", "tensorboard", "open")
_WHOLE_FOLDERS = (
    "open/round-*",
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
    """

    state: RunState
    round: int
    updated: str


class RunFolder:
    """A run's folder, held by this process until it is closed.

    Use `RunFolder.create` for a new run and `RunFolder.open` to continue one; to read only, the
    paths can be used without a lock: `RunFolder(path)`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None

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
            for below in (folder.checkpoints, folder.exports):
                below.mkdir(exist_ok=True)
            folder.write_status("running", 0)
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Lock the folder of an existing run, to continue it.

        Raises:
            RunError: the folder holds no run, or another coordinator uses it.
        """
        if not cls(path).holds_run:
            raise RunError(f"{path} holds no run; start one with: fedtune simulate RUN.toml")
        return cls._locked(path)

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
        write_json(self.status, {"state": state, "round": round, "updated": updated})

    def read_status(self) -> RunStatus:
        """How far the run is.

        Raises:
            RunError: there is no status file, or it is not one.
        """
        try:
            tree = json.loads(self.status.read_text(encoding="utf-8"))
            state, round, updated = tree["state"], int(tree["round"]), str(tree["updated"])
        except OSError as error:
            raise RunError(f"{self.status} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{self.status} is not a status file; the run is damaged") from None
        if state not in get_args(RunState):
            raise RunError(
                f"{self.status}: expected state {', '.join(get_args(RunState))}, got {state!r}"
            )
        return RunStatus(cast(RunState, state), round, updated)

    def _holds_nothing_to_lose(self) -> bool:
        """Whether a run failed or was interrupted here before it had joined anything."""
        if not self.status.exists() or any(self.checkpoints.glob("round-*")):
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
    """Replace a file with a JSON value; a reader finds the old one or the new one, whole."""
    temporary = path.with_name(f"{path.name}.partial")
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
