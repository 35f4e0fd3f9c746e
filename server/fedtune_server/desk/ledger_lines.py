"""A ledger's lines as they are, in pieces of bounded size, from a file that somebody writes to."""

from __future__ import annotations

from pathlib import Path

from fedtune_server.desk.view import LedgerLine

_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 8 << 20


class LedgerLines:
    """Reads on in a ledger that need not be there yet, and notices one that was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = b""
        self._offset = 0
        self._count = 0

    def read(self) -> tuple[bool, list[LedgerLine]]:
        """Whether the ledger is another one than before, and lines that were not read yet.

        Not all of them if they are many; none when there are none left. A line counts when its
        line break is there.
        """
        try:
            with self._path.open("rb") as file:
                anew = self._is_another(file.read(len(self._start)), file.seek(0, 2))
                if anew:
                    self._start, self._offset, self._count = b"", 0, 0
                file.seek(self._offset)
                data = file.read(_PIECE_BYTES)
                while data and b"\n" not in data and len(data) < _LONGEST_LINE:
                    more = file.read(_PIECE_BYTES)
                    if not more:
                        break
                    data += more
        except OSError:
            return False, []
        whole = data[: data.rfind(b"\n") + 1]
        if whole and not self._start:
            self._start = whole[: whole.index(b"\n") + 1]
        self._offset += len(whole)
        found = []
        for line in whole.split(b"\n")[:-1]:
            self._count += 1
            found.append(LedgerLine(self._count, line.decode("utf-8", "replace")))
        return anew, found

    def _is_another(self, start: bytes, size: int) -> bool:
        # Every ledger's first line has its own time.
        return start != self._start or size < self._offset
