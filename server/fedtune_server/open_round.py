"""The answers of a round that has not closed, on the disk instead of in memory.

    open/round-0007/3f2a...body  3f2a...tensors

Two files hold what a device answered: the packed tensors, and the body of the answer, both as they
came; the body is written last, so an answer is there once its body is. The tensors are mapped in: a
thousand updates take no more memory than one, and a coordinator that was killed finds them again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from fedtune.wire.durable import write_durably, writing
from fedtune.wire.packing import Packed

_BODY, _TENSORS = ".body", ".tensors"


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

        Raises:
            RunError: the disk is full or cannot be written.
        """
        path = self._path(round, device)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.drop(round, device)
        write_durably(path.with_suffix(_TENSORS), tensors)
        write_durably(path, body)
        return self._read(path)

    def drop(self, round: int, device: str) -> None:
        """Forget an answer, because it is no good."""
        path = self._path(round, device)
        path.unlink(missing_ok=True)
        self._mapped.pop(path, None)
        with suppress(PermissionError):  # Windows, while an array still reads it
            path.with_suffix(_TENSORS).unlink(missing_ok=True)

    def kept(self, round: int, devices: Iterable[str]) -> dict[str, Kept]:
        """Answers of some devices to a round that are on the disk, in the devices' order."""
        paths = {device: self._path(round, device) for device in devices}
        return {
            device: self._read(path)
            for device, path in paths.items()
            if path.exists() and path.with_suffix(_TENSORS).exists()
        }

    def close(self, round: int) -> None:
        """Remove what is kept of a round, now that what it led to is saved."""
        self._remove([self._round(round)])

    def forget_all_but(self, round: int | None) -> None:
        """Remove what is kept of other rounds, which are over or begin anew; None: of all."""
        folders = self._folder.glob("round-*")
        self._remove([f for f in folders if round is None or f != self._round(round)])

    def _remove(self, folders: Sequence[Path]) -> None:
        for path in [path for path in self._mapped if path.parent in folders]:
            del self._mapped[path]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # Windows keeps a file that is still mapped

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
