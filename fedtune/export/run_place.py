"""Where a run's folder is, and whether a coordinator is at work in it; nothing is written there."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from fedtune.errors import RunError

RUNS = Path("runs")
"""Where runs lie unless `outputs.folder` says otherwise."""

_MARKS = ("ledger.jsonl", "status.json", "config.json")
_LOCK = ".lock"
_NAMED = 5


def run_place(name: str) -> Path:
    """The folder that a person means: a path, or else the name of a run below `runs`."""
    path = Path(name)
    return path if path.is_dir() or len(path.parts) > 1 else RUNS / path


def find_run(name: str) -> Path:
    """The folder of a run, by its path or by its name below `runs`.

    Raises:
        RunError: there is no run.
    """
    place = run_place(name)
    if holds_run(place):
        return place
    where = f"{place} is a folder without a run" if place.is_dir() else f"no run is at {place}"
    raise RunError(f"{where}; {_known_runs()}")


def holds_run(folder: Path) -> bool:
    """Whether a run has written into a folder."""
    return any((folder / name).is_file() for name in _MARKS)


def coordinator_at_work(folder: Path) -> bool | None:
    """Whether a process holds the lock of a run folder; None where that cannot be told.

    A free lock is taken for an instant, because that is the only question that every system
    answers. Ask seldom: a coordinator that starts at that instant is refused.
    """
    path = folder.resolve() / _LOCK
    if not path.exists():
        return False
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None  # a folder that may only be read, or a disk that knows no locks
    lock.release()
    return False


def _known_runs() -> str:
    if not RUNS.is_dir():
        return "name the folder of a run, such as runs/demo"
    found = sorted(path.name for path in RUNS.iterdir() if holds_run(path))
    if not found:
        return "name the folder of a run, such as runs/demo"
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"runs here: {', '.join(found[:_NAMED])}{more}"
