"""The ledger: every event of a run, one JSON line each, chained by hashes.

A line holds `seq` (from 0), `time` (UTC, ISO 8601), `kind`, the event's fields, `prev` (sha256 of
the line before, without its line break; of the first: 64 zeros) and `hash` (sha256 of the same
line without `hash`). Whoever changes, removes or reorders a line breaks the chain at that line. It
is a check against accidents and careless editing: someone who rewrites the whole file can make a
new chain.
"""

from __future__ import annotations

import hashlib
import json
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
from fedtune.wire.events import event_object, json_line

_FIRST = "0" * 64
_OWN_KEYS = frozenset({"seq", "time", "prev", "hash"})
_FSYNC_KINDS = frozenset(
    {
        "run_started",
        "run_resumed",
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
            line = _sealed(entry)
            with writing(self._path):
                self._write(line + b"\n", durably=event.kind in _FSYNC_KINDS)
            self._seq, self._prev = self._seq + 1, _sha256(line)

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


def verify_ledger(path: Path) -> list[dict[str, object]]:
    """Read a ledger and check its chain; its lines as JSON objects, in order.

    Raises:
        RunError: the file cannot be read, or a line is broken; the message has its number.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"ledger {path} cannot be read ({error.strerror})") from None
    entries: list[dict[str, object]] = []
    prev = _FIRST
    for seq, line in enumerate(_lines(data)):
        entry = _checked(line, seq, prev, path)
        entries.append(entry)
        prev = _sha256(line)
    if data and not data.endswith(b"\n"):
        raise RunError(f"{path} line {len(entries)}: expected a line break at its end")
    return entries


def training_ended(path: Path) -> bool:
    """Whether all that a ledger tells of since its last round is that the training ended.

    Raises:
        RunError: the file cannot be read.
    """
    last = _last_of(path, ("run_finished", "round_started", "run_started"))
    return last.get("kind") == "run_finished"


def last_run(path: Path) -> str:
    """Id of the run that a ledger tells of; empty where it tells of none.

    Raises:
        RunError: the file cannot be read.
    """
    return str(_last_of(path, ("run_started", "run_resumed")).get("run", ""))


def _last_of(path: Path, kinds: Collection[str]) -> dict[str, object]:
    """The last line of one of these kinds; empty where there is none."""
    try:
        lines = _lines(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"ledger {path} cannot be read ({error.strerror})") from None
    parsed = (_parsed(line) or {} for line in reversed(lines))
    return next((line for line in parsed if line.get("kind") in kinds), {})


def _continue(path: Path) -> tuple[int, str]:
    """Number of the next line and hash of the last one; a torn last line is cut off."""
    if not path.exists():
        return 0, _FIRST
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    lines = _lines(whole)
    if not lines:
        return 0, _FIRST
    last = _parsed(lines[-1])
    if last is None or last.get("seq") != len(lines) - 1:
        raise RunError(f"{path} line {len(lines)}: expected seq {len(lines) - 1} in a JSON object")
    return len(lines), _sha256(lines[-1])


def _lines(data: bytes) -> list[bytes]:
    # Only \n ends a line: splitlines would also split at other characters inside a text.
    lines = data.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def _sealed(entry: dict[str, object]) -> bytes:
    text = json_line(entry).encode("utf-8")
    return text[:-1] + f',"hash":"{_sha256(text)}"}}'.encode()


def _checked(line: bytes, seq: int, prev: str, path: Path) -> dict[str, object]:
    where = f"{path} line {seq + 1}"
    entry = _parsed(line)
    if entry is None:
        raise RunError(f"{where}: expected a JSON object; the ledger was changed or cut")
    if entry.get("seq") != seq:
        raise RunError(f"{where}: expected seq {seq}, got {entry.get('seq')!r}; lines are missing")
    if entry.get("prev") != prev:
        raise RunError(f"{where}: prev is not the hash of the line before; a line was changed")
    without_hash = {key: value for key, value in entry.items() if key != "hash"}
    if _sealed(without_hash) != line:
        raise RunError(f"{where}: hash is not that of the line; the line was changed")
    return entry


def _parsed(line: bytes) -> dict[str, object] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
