"""The ledger: every event of a run, one JSON line each, chained by hashes.

What a line holds, and how the chain is checked: `fedtune.wire.ledger_chain`.
"""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from fedtune.errors import RunError
from fedtune.records import Event
from fedtune.wire.events import event_object
from fedtune.wire.ledger_chain import FIRST, line_hash, parsed, sealed, split_lines

_OWN_KEYS = frozenset({"seq", "time", "prev", "hash"})
_FSYNC_KINDS = frozenset(
    {
        "run_started",
        "planned",
        "round_finished",
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
        RunError: the file exists and is not a ledger.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seq, self._prev = _continue(path)
        self._file = path.open("ab")

    def append(self, event: Event) -> None:
        """Write one event.

        Raises:
            ValueError: a field has the name of one of the ledger's own keys.
            TypeError: a field has no JSON form.
        """
        clash = sorted(_OWN_KEYS & set(event.fields))
        if clash:
            raise ValueError(f"event {event.kind} must not have a field called {clash[0]}")
        fields = event_object(event)
        with self._lock:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            entry = {"seq": self._seq, "time": time} | fields | {"prev": self._prev}
            line = sealed(entry)
            self._file.write(line + b"\n")
            self._file.flush()
            if event.kind in _FSYNC_KINDS:
                os.fsync(self._file.fileno())
            self._seq, self._prev = self._seq + 1, line_hash(line)

    __call__ = append

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
