"""A run's ledger as it grows: the whole lines that were added since the last look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.errors import RunError
from fedtune.export.ledger_facts import Line
from fedtune.wire.ledger_chain import parsed, split_lines

_OWN_KEYS = ("seq", "time", "kind", "prev", "hash")


@dataclass(frozen=True, slots=True)
class News:
    """What a look found.

    Attributes:
        lines: since the look before.
        anew: whether they are of another ledger, because the run was replaced.
    """

    lines: tuple[Line, ...]
    anew: bool = False


class LedgerTail:
    """Reads on in a ledger that someone else writes; the file need not be there yet.

    A line counts when its line break is there. The file is open only while it is read, because
    Windows would not let a coordinator replace it otherwise.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = b""
        self._read_bytes = 0
        self._count = 0

    def read(self) -> News:
        """The lines that came since the last call.

        Raises:
            RunError: the file cannot be read, or a whole line is not a JSON object.
        """
        try:
            anew, data = self._new_bytes()
        except FileNotFoundError:
            return News(())
        except OSError as error:
            raise RunError(f"ledger {self._path} cannot be read ({error.strerror})") from None
        whole = data[: data.rfind(b"\n") + 1]
        lines = split_lines(whole)
        found = tuple(self._line(line) for line in lines)
        if lines and not self._first:
            self._first = lines[0]
        self._read_bytes += len(whole)
        return News(found, anew)

    def _new_bytes(self) -> tuple[bool, bytes]:
        with self._path.open("rb") as file:
            # Every ledger's first line has its own time, and a run id soon after.
            same = file.read(len(self._first)) == self._first
            size = file.seek(0, 2)
            anew = not same or size < self._read_bytes
            if anew:
                self._first, self._read_bytes, self._count = b"", 0, 0
            file.seek(self._read_bytes)
            return anew, file.read()

    def _line(self, line: bytes) -> Line:
        self._count += 1
        found = parsed(line)
        if found is None:
            raise RunError(
                f"line {self._count} of {self._path} is not a JSON object; check the ledger with: "
                "fedtune verify"
            )
        return found


def fields_of(line: Line) -> Mapping[str, object]:
    """The fields of the event in a line."""
    return {key: value for key, value in line.items() if key not in _OWN_KEYS}


def line_time(line: Line) -> datetime | None:
    """When a line was written; None if it does not say so."""
    try:
        found = datetime.fromisoformat(str(line.get("time")))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
