"""The chain of a run's ledger: how a line is sealed, and whether a file is still what was written.

A line holds `seq` (from 0), `time` (UTC, ISO 8601), `kind`, the event's fields, `prev` (sha256 of
the line before, without its line break; of the first: 64 zeros) and `hash` (sha256 of the same
line without `hash`). Whoever changes, removes or reorders a line breaks the chain at that line. It
is a check against accidents and careless editing: someone who rewrites the whole file can make a
new chain. The coordinator writes the ledger; who reads it needs no coordinator.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from fedtune.errors import RunError
from fedtune.wire.events import json_line

FIRST: Final = "0" * 64
"""What the first line has for the hash of the line before it."""


def verify_ledger(path: Path) -> list[dict[str, object]]:
    """Read a ledger and check its chain; its lines as JSON objects, in order.

    Raises:
        RunError: the file cannot be read, or a line is broken; the message has its number.
    """
    data = _read(path)
    entries = _chained(path, data)
    if data and not data.endswith(b"\n"):
        raise RunError(f"{path} line {len(entries)}: expected a line break at its end")
    return entries


def verify_whole_lines(path: Path) -> tuple[list[dict[str, object]], bool]:
    """As `verify_ledger`, of a ledger that may be growing: a last line without its end is left out.

    Returns:
        The lines, and whether there was such a rest: a line that is being written, or the half of
        one that a killed coordinator left.

    Raises:
        RunError: the file cannot be read, or a whole line is broken; the message has its number.
    """
    data = _read(path)
    whole = data[: data.rfind(b"\n") + 1]
    return _chained(path, whole), len(whole) != len(data)


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a ledger's bytes, without their line breaks."""
    # Only \n ends a line: splitlines would also split at other characters inside a text.
    lines = data.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def sealed(entry: dict[str, object]) -> bytes:
    """A line, without its line break: the entry with its own hash behind it."""
    text = json_line(entry).encode("utf-8")
    return text[:-1] + f',"hash":"{line_hash(text)}"}}'.encode()


def parsed(line: bytes) -> dict[str, object] | None:
    """A line as a JSON object; None if it is not one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def line_hash(line: bytes) -> str:
    """Hex sha256 of a line, which the next line holds as `prev`."""
    return hashlib.sha256(line).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"ledger {path} cannot be read ({error.strerror})") from None


def _chained(path: Path, data: bytes) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    prev = FIRST
    for seq, line in enumerate(split_lines(data)):
        entries.append(_checked(line, seq, prev, path))
        prev = line_hash(line)
    return entries


def _checked(line: bytes, seq: int, prev: str, path: Path) -> dict[str, object]:
    where = f"{path} line {seq + 1}"
    entry = parsed(line)
    if entry is None:
        raise RunError(f"{where}: expected a JSON object; the ledger was changed or cut")
    if entry.get("seq") != seq:
        raise RunError(f"{where}: expected seq {seq}, got {entry.get('seq')!r}; lines are missing")
    if entry.get("prev") != prev:
        raise RunError(f"{where}: prev is not the hash of the line before; a line was changed")
    without_hash = {key: value for key, value in entry.items() if key != "hash"}
    if sealed(without_hash) != line:
        raise RunError(f"{where}: hash is not that of the line; the line was changed")
    return entry
