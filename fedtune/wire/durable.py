"""Files that survive a crash: whole under their name, or not there at all.

A file is written under a temporary name, flushed to the disk and renamed, and then its folder is
flushed, because a new name is an entry of the folder. A disk that is full or cannot be written is
one line that names the file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fedtune.errors import RunError

PARTIAL = ".partial"
"""End of a temporary name; what has it was being written when its process ended."""

_AGAIN = "then give the same command again: all that was saved before is whole"
_REMEDIES = {
    errno.ENOSPC: f"free some space on its disk, {_AGAIN}",
    errno.EDQUOT: f"free some space below your quota, {_AGAIN}",
    errno.EROFS: f"its disk is read-only: make it writable, {_AGAIN}",
    errno.EACCES: f"give this user the right to write there, {_AGAIN}",
    errno.EPERM: f"give this user the right to write there, {_AGAIN}",
}
_OS_ERROR = re.compile(r"I/O error: (?P<words>.*) \(os error (?P<number>\d+)\)")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a write that fails which file it was for, and what to do.

    Raises:
        RunError: in place of an OSError, and of a SafetensorError that comes from one.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(path, error.errno or 0, error.strerror or str(error)) from error
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise _not_written(path, int(found["number"]), found["words"]) from error


def _not_written(path: Path, number: int, words: str) -> RunError:
    remedy = _REMEDIES.get(number, f"check its disk, {_AGAIN}")
    return RunError(f"{path} cannot be written ({words}); {remedy}")


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file; a crash leaves the old one or the new one, whole.

    Raises:
        RunError: the disk is full or cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):  # a full disk needs the space, and a later start cleans up too
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name == "nt":  # Windows cannot open a folder to flush it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
