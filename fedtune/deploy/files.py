"""Private files and whole folders: what a home is made of, readable by its owner alone.

On Windows a file has no mode bits: what lies in a user's own folder is that user's, and nothing is
changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.errors import DeploymentError
from fedtune.wire.durable import PARTIAL, sync_folder, writing

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
PUBLIC_FILE = 0o644


def write_private(path: Path, content: bytes) -> None:
    """Replace a file that its owner alone may read; a crash leaves the old or the new, whole.

    Raises:
        RunError: the disk is full or cannot be written; the old file stays.
    """
    write_with_mode(path, content, PRIVATE_FILE)


def write_with_mode(path: Path, content: bytes, mode: int) -> None:
    """Replace a file; nobody sees it with wider rights than `mode` at any time.

    Raises:
        RunError: the disk is full or cannot be written; the old file stays.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)  # of a process that ended; its mode may be another
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with os.fdopen(os.open(temporary, flags, mode), "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def make_private_folder(path: Path) -> None:
    """Make a folder, and those above it, that its owner alone may enter.

    Raises:
        RunError: it cannot be made.
    """
    with writing(path):
        path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)


def refuse_filled(folder: Path, remedy: str) -> None:
    """Let a new home be made only where nothing is.

    Args:
        remedy: what the user can do instead.

    Raises:
        DeploymentError: the folder is a file, or holds something; the message names it.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise DeploymentError(f"expected a folder at {folder}, found a file; {remedy}")
    held = sorted(entry.name for entry in folder.iterdir())
    if held:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise DeploymentError(
            f"{folder} holds {', '.join(held[:3])}{more}, and nothing is overwritten; {remedy}"
        )


@contextmanager
def new_home(folder: Path, remedy: str) -> Iterator[Path]:
    """Fill a new folder beside its place, then move it there: whole, or not at all.

    Args:
        folder: where the home shall be; nothing may be there, or an empty folder.
        remedy: what the user can do where it is not empty.

    Yields:
        The folder to fill.

    Raises:
        DeploymentError: something is there already.
        RunError: the disk is full or cannot be written.
    """
    folder = folder.absolute()
    refuse_filled(folder, remedy)
    make_private_folder(folder.parent)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    with writing(staging):
        staging.mkdir(mode=PRIVATE_FOLDER)
    try:
        yield staging
        move_home(staging, folder, remedy)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # it is gone where all went well


def move_home(staging: Path, folder: Path, remedy: str) -> None:
    """Move a filled folder to its place.

    Raises:
        DeploymentError: something came to be there meanwhile.
        RunError: the disk cannot be written.
    """
    refuse_filled(folder, remedy)
    with writing(folder):
        if _is_mount_or_link(folder):  # a container's volume cannot be replaced, only filled
            _move_entries(staging, folder)
        else:
            if folder.exists():
                folder.rmdir()
            os.rename(staging, folder)
            sync_folder(folder.parent)


def _is_mount_or_link(folder: Path) -> bool:
    return folder.is_symlink() or (folder.is_dir() and os.path.ismount(folder))


def _move_entries(staging: Path, folder: Path) -> None:
    moved: list[Path] = []
    try:
        for entry in sorted(staging.iterdir()):
            target = folder / entry.name
            shutil.move(entry, target)
            moved.append(target)
    except OSError:
        for target in moved:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        raise
    with suppress(OSError):
        folder.chmod(PRIVATE_FOLDER)
    sync_folder(folder)
