"""What the ledger keeps of the files of a run, so that they can be proven later: their sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fedtune.records import Event


def file_digest(path: Path) -> str:
    """Hex sha256 of a file, streamed.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_saved(path: Path, round: int) -> Event:
    """What the ledger says of a checkpoint that was just written.

    Raises:
        OSError: it cannot be read.
    """
    fields = {"round": round, "file": path.name, "sha256": file_digest(path)}
    return Event("checkpoint_saved", fields)


def export_digests(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    """Sha256 of every file of some exports, by its path from the run folder, with slashes.

    Args:
        folder: the run folder.
        paths: of exports in it, each a file or a folder. An ONNX file's values may stand beside
            it, in a file whose name is longer by `.data`; it counts too.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        file.relative_to(folder).as_posix(): file_digest(file)
        for path in paths
        for file in export_files(Path(path))
    }


def export_files(path: Path) -> list[Path]:
    """The files of one export, in the order of their names; none where it is missing."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file())
