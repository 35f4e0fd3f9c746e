"""Which files of a run or a base may be downloaded, and their digests.

Nothing is followed out of a folder: a link in a run's folder is left out, and one in a base's
folder must lead to a file of the same model in the hub's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.manifest import check_path
from fedtune.errors import DeploymentError, ModelError, ProtocolError
from fedtune.model.source import base_digest, weight_files
from fedtune.wire.durable import write_durably

_BASE_ENDINGS = (".json", ".model", ".txt", ".jinja")
_RUN_FILES = ("config.json", "plan.json", "report.html")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that may be downloaded.

    Attributes:
        path: relative, with `/`.
        place: where it is.
    """

    path: str
    place: Path
    size: int
    mtime_ns: int


def run_files(folder: Path) -> tuple[LocalFile, ...]:
    """A run's configuration, plan, newest checkpoint, exports and report, as far as there are."""
    found = [folder / name for name in _RUN_FILES]
    found += sorted((folder / "checkpoints").glob("round-*.safetensors"))[-1:]
    found += sorted((folder / "exports").rglob("*"))
    return tuple(_look(folder, found, links=False))


def base_files(folder: Path) -> tuple[LocalFile, ...]:
    """A base's weights, configuration and tokenizer.

    Raises:
        ModelError: the folder is not a base model's.
    """
    # The index goes along: without it, shards are not a model.
    found = {path for path in folder.iterdir() if path.suffix in _BASE_ENDINGS}
    return tuple(_look(folder, sorted(found | set(weight_files(folder))), links=True))


def _look(folder: Path, paths: Sequence[Path], *, links: bool) -> Iterator[LocalFile]:
    for path in paths:
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not _stays(folder, path, links=links):
            continue
        try:
            check_path(relative.as_posix())
            found = path.stat()
        except (ProtocolError, OSError):
            continue  # a name that some system cannot have, or a file that has just gone
        if stat.S_ISREG(found.st_mode):
            yield LocalFile(relative.as_posix(), path, found.st_size, found.st_mtime_ns)


def _stays(folder: Path, path: Path, *, links: bool) -> bool:
    """Whether a path is in its folder, or a blob of the same model."""
    try:
        place, within = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    if place == within / path.relative_to(folder):
        return True
    # The hub's cache: models--ORG--NAME/snapshots/COMMIT/file -> ../../blobs/DIGEST
    return links and place.parent == (within.parent.parent / "blobs")


class Bases:
    """The base models that sites may download, by digest.

    Args:
        folders: of `server.toml`.
        remembered: folder for digests of large bases.
    """

    def __init__(self, folders: Sequence[Path], remembered: Path) -> None:
        self._folders, self._remembered = folders, remembered
        self._lock = threading.Lock()

    def find(self, digest: str) -> Path:
        """The folder of a base.

        Raises:
            DeploymentError: no folder holds it.
        """
        reasons = []
        with self._lock:  # hashing a base twice at once would only take longer
            for folder in self._folders:
                try:
                    if base_digest(folder, self._remembered) == digest:
                        return folder
                except ModelError as error:
                    reasons.append(str(error))
        more = f" ({'; '.join(reasons)})" if reasons else ""
        raise DeploymentError(
            f"no base model with digest {digest[:80]} is offered here{more}; add its folder to "
            "`bases` in the coordinator's server.toml, or copy it to the site"
        )


class Digests:
    """sha256 of files, remembered by path, size and time of change, also on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()

    def of(self, file: LocalFile) -> str:
        """The file's digest, hex.

        Raises:
            OSError: it cannot be read.
        """
        key = (str(file.place.resolve()), file.size, file.mtime_ns)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._recall(key, file.place)
            return self._known[key]

    def _recall(self, key: tuple[str, int, int], place: Path) -> str:
        note = self._folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()
        with contextlib.suppress(OSError):
            found = note.read_text(encoding="ascii", errors="replace")
            if len(found) == 64 and set(found) <= set("0123456789abcdef"):
                return found
        with place.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if os.stat(place).st_mtime_ns == key[2] and key[1] > 1 << 26:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(note, digest.encode("ascii"))
        return digest
