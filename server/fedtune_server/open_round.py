"""The answers of a round that has not closed, on the disk instead of in memory.

    open/round-0007/3f2a...body  3f2a...tensors

Two files per device: the packed tensors, and the body of the answer, both as they came; the body is
written last, so an answer is there once its body is. The tensors are mapped in: a thousand updates
take no more memory than one, and a coordinator that was killed finds them again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from fedtune.wire.packing import Packed

_BODY, _TENSORS, _PARTIAL = ".body", ".tensors", ".partial"


@dataclass(frozen=True, slots=True)
class Kept:
    """One answer as it came: the body of its message, and the packed tensors beside it."""

    body: bytes
    tensors: Packed


class OpenRounds:
    """Keeps answers by the round that they answer, and by device.

    Args:
        folder: made when the first answer is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[Path, mmap] = {}

    def keep(self, round: int, device: str, body: bytes, tensors: bytes) -> Kept:
        """Write an answer to the disk, and give it back as it lies there.

        What an earlier answer of the device to the same round said is replaced.
        """
        path = self._path(round, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.drop(round, device)
        _write(path.with_suffix(_TENSORS), tensors)
        _write(path, body)
        return self._read(path)

    def drop(self, round: int, device: str) -> None:
        """Forget an answer, because it is no good."""
        path = self._path(round, device)
        path.unlink(missing_ok=True)
        self._mapped.pop(path, None)
        with suppress(PermissionError):  # Windows, while an array still reads it
            path.with_suffix(_TENSORS).unlink(missing_ok=True)

    def kept(self, round: int) -> Iterator[Kept]:
        """Answers to a round that are on the disk, in the order of their files' names."""
        for path in sorted(self._round(round).glob(f"*{_BODY}")):
            yield self._read(path)

    def close(self, round: int) -> None:
        """Remove what is kept of a round, now that what it led to is saved."""
        folder = self._round(round)
        for path in [path for path in self._mapped if path.parent == folder]:
            del self._mapped[path]
        shutil.rmtree(folder, ignore_errors=True)

    def _round(self, round: int) -> Path:
        return self._folder / f"round-{round:04d}"

    def _path(self, round: int, device: str) -> Path:
        # A device's name may hold characters that a file's cannot.
        name = hashlib.sha256(device.encode("utf-8")).hexdigest()[:32]
        return self._round(round) / f"{name}{_BODY}"

    def _read(self, path: Path) -> Kept:
        if path not in self._mapped:
            with path.with_suffix(_TENSORS).open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                    return Kept(path.read_bytes(), b"")
                self._mapped[path] = mmap(file.fileno(), 0, access=ACCESS_READ)
        return Kept(path.read_bytes(), self._mapped[path])


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(path.suffix + _PARTIAL)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
