"""The ledger: every event of a run, one JSON line each, chained by hashes.

What a line holds, and how the chain is checked: `fedtune.wire.ledger_chain`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from fedtune.errors import RunError
from fedtune.records import Event
from fedtune.wire.durable import writing
from fedtune.wire.events import event_object
from fedtune.wire.ledger_chain import FIRST, line_hash, parsed, sealed, split_lines

_OWN_KEYS = frozenset({"seq", "time", "prev", "hash"})
_FSYNC_KINDS = frozenset(
    {
        "run_started",
        "run_resumed",
        "planned",
        "round_finished",
        "checkpoint_saved",
        "evaluated",
        "exported",
        "run_finished",
        "run_interrupted",
        "run_failed",
    }
)
"""After these the line is on the disk, not only with the operating system."""


class Ledger:
    """Appends events to a ledger file; continues one that exists.

    A last line without its line break was being written when the process was killed; it is
    removed. Threads may share a ledger.

    Raises:
        RunError: the file exists and is not a ledger, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with writing(path):
            self._seq, self._prev = _continue(path)
            # Unbuffered: what a full disk did not take must not come back at the next line.
            self._file = path.open("ab", buffering=0)

    def append(self, event: Event) -> None:
        """Write one event.

        Raises:
            ValueError: a field has the name of one of the ledger's own keys.
            TypeError: a field has no JSON form.
            RunError: the disk is full or cannot be written; the lines before stay whole.
        """
        clash = sorted(_OWN_KEYS & set(event.fields))
        if clash:
            raise ValueError(f"event {event.kind} must not have a field called {clash[0]}")
        fields = event_object(event)
        with self._lock:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            entry = {"seq": self._seq, "time": time} | fields | {"prev": self._prev}
            line = sealed(entry)
            with writing(self._path):
                self._write(line + b"\n", durably=event.kind in _FSYNC_KINDS)
            self._seq, self._prev = self._seq + 1, line_hash(line)

    __call__ = append

    def _write(self, line: bytes, durably: bool) -> None:
        """Append a line, or nothing of it."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            if durably:
                os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):  # the next start cuts off what is left of it
                self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def training_ended(path: Path) -> bool:
    """Whether all that a ledger tells of since its last round is that the training ended.

    Raises:
        RunError: the file cannot be read.
    """
    last = _last_of(path, ("run_finished", "round_started", "run_started"))
    return last.get("kind") == "run_finished"


def last_saved(path: Path) -> int:
    """The round of the checkpoint that a ledger told of last; -1 where it told of none.

    Raises:
        RunError: the file cannot be read.
    """
    found = _last_of(path, ("checkpoint_saved",)).get("round", -1)
    return found if isinstance(found, int) else -1


def last_run(path: Path) -> str:
    """Id of the run that a ledger tells of; empty where it tells of none.

    Raises:
        RunError: the file cannot be read.
    """
    return str(_last_of(path, ("run_started", "run_resumed")).get("run", ""))


def _last_of(path: Path, kinds: Collection[str]) -> dict[str, object]:
    """The last line of one of these kinds; empty where there is none."""
    try:
        lines = split_lines(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"ledger {path} cannot be read ({error.strerror})") from None
    found = (parsed(line) or {} for line in reversed(lines))
    return next((line for line in found if line.get("kind") in kinds), {})


def _continue(path: Path) -> tuple[int, str]:
    """Number of the next line and hash of the last one; a torn last line is cut off."""
    if not path.exists():
        return 0, FIRST
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    lines = split_lines(whole)
    if not lines:
        return 0, FIRST
    last = parsed(lines[-1])
    if last is None or last.get("seq") != len(lines) - 1:
        raise RunError(f"{path} line {len(lines)}: expected seq {len(lines) - 1} in a JSON object")
    return len(lines), line_hash(lines[-1])
