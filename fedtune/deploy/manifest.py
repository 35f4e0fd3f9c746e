"""Manifests of files to download, read as what they are: words from the network.

A path of a manifest becomes a path of this machine, so it is checked for every system that there
is, not only for this one: a folder may be copied on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedtune.errors import ProtocolError
from fedtune.v1 import coordinator_pb2 as pb

MOST_FILES: Final = 10_000
MOST_BYTES: Final = 1 << 44
"""16 TiB: far above any base model, far below where sums could be wrong."""
CHUNK_BYTES: Final = 1 << 20

_MOST_CHARACTERS = 512
_DEEPEST = 12
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_TEMPORARY = ".partial"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that can be downloaded.

    Attributes:
        path: relative, with `/`.
        size: bytes.
        sha256: hex, of the whole file.
    """

    path: str
    size: int
    sha256: str


def read_manifest(manifest: pb.Manifest) -> tuple[RemoteFile, ...]:
    """The files of a manifest, checked.

    Raises:
        ProtocolError: a path could leave the folder or be another file's on some system, a size is
            not possible, or a digest is not one.
    """
    if not 0 < len(manifest.files) <= MOST_FILES:
        raise _refused(f"expected 1 to {MOST_FILES} files, found {len(manifest.files)}")
    files = tuple(_read_file(file) for file in manifest.files)
    total = sum(file.size for file in files)
    if total > MOST_BYTES:
        raise _refused(f"expected at most {MOST_BYTES} bytes in all, found {total}")
    _check_distinct([file.path for file in files])
    return files


def _read_file(file: pb.ArtifactFile) -> RemoteFile:
    check_path(file.path)
    if file.size > MOST_BYTES:
        raise _refused(f"{file.path}: expected at most {MOST_BYTES} bytes, found {file.size}")
    if not _SHA256.fullmatch(file.sha256):
        raise _refused(f"{file.path}: expected a sha256 in hex, found {file.sha256[:80]!r}")
    return RemoteFile(file.path, file.size, file.sha256)


def check_path(path: str) -> None:
    """Refuse a path that is not one below a folder, on any system.

    Raises:
        ProtocolError: it is absolute, leaves the folder, or has a part that some system takes for
            something else.
    """
    parts = path.split("/")
    if len(path) > _MOST_CHARACTERS or len(parts) > _DEEPEST:
        raise _refused(f"a path is too long or too deep: {path[:80]!r}...")
    if not all(map(_is_name, parts)):
        raise _refused(f"{path!r} is not a plain path below a folder")


def _is_name(part: str) -> bool:
    return (
        part not in ("", ".", "..")
        and len(part.encode("utf-8", "replace")) <= 200
        and part.isprintable()
        and not _FORBIDDEN.search(part)
        and not part.endswith((" ", ".", _TEMPORARY))
        and not part.startswith(" ")
        and not _DEVICES.fullmatch(part)
    )


def _check_distinct(paths: Sequence[str]) -> None:
    """No path twice, nor as a folder of another, where letters' case does not count."""
    folded = [path.casefold() for path in paths]
    files = set(folded)
    if len(files) != len(folded):
        raise _refused("a path is there twice")
    for path in folded:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise _refused(f"{'/'.join(parts[:depth])!r} is a file and a folder")


def _refused(words: str) -> ProtocolError:
    return ProtocolError(f"manifest of the coordinator: {words}; nothing is downloaded")
