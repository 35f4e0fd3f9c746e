"""A lock file, so that two coordinators never write to one run folder.

The file holds the process id and the machine of its owner. A lock whose owner is gone, because it
was killed or the machine lost power, is taken over; on another machine sharing the folder nobody
can tell, so there the lock stands until a person removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import uuid
from pathlib import Path

from fedtune.errors import RunError

NAME = ".lock"
_ATTEMPTS = 5
_WRITING_S = 0.05

_held: set[Path] = set()
"""Locks of this process: an own process id in a lock that is not in here was another's once."""


class FolderLock:
    """The right to write to a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def acquire(cls, folder: Path) -> FolderLock:
        """Take the lock of a folder.

        Raises:
            RunError: another coordinator has it.
        """
        path = folder.resolve() / NAME
        for _ in range(_ATTEMPTS):
            if _create(path):
                _held.add(path)
                return cls(path)
            content = _read(path)
            if content is not None and _owner(content) is None:
                # Its owner is about to write to it, or was killed in that moment.
                time.sleep(_WRITING_S)
                content = _read(path)
            if content is not None:
                if _owner_lives(path, content):
                    raise RunError(_in_use(folder, path, content))
                _remove_stale(path, content)
        raise RunError(f"{folder} is being taken by several coordinators at once; try again")

    def release(self) -> None:
        """Give the lock back."""
        _held.discard(self._path)
        self._path.unlink(missing_ok=True)


def _create(path: Path) -> bool:
    """Make the lock file, unless there is one: the file system lets only one process do so."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(
            f"run folder {path.parent} cannot be written ({error.strerror}); "
            "choose another outputs.folder"
        ) from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    return True


def _read(path: Path) -> str | None:
    """What the lock file holds, or None when it has just gone."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _owner(content: str) -> tuple[int, str] | None:
    try:
        tree = json.loads(content)
        return int(tree["pid"]), str(tree["host"])
    except (ValueError, KeyError, TypeError):
        return None


def _owner_lives(path: Path, content: str) -> bool:
    owner = _owner(content)
    if owner is None:
        return False
    pid, host = owner
    if host != socket.gethostname():
        return True
    if pid == os.getpid():
        return path in _held
    return _process_lives(pid)


def _in_use(folder: Path, path: Path, content: str) -> str:
    pid, host = _owner(content) or (0, "")
    return (
        f"{folder} is in use by process {pid} on {host}; wait for it or choose another "
        f"outputs.folder. If that process is no fedtune coordinator, delete {path}"
    )


def _remove_stale(path: Path, content: str) -> None:
    """Remove a lock whose owner is gone, if it is still that lock.

    Two coordinators may find the same stale lock. Renaming lets only one of them have it, and one
    that gets hold of the other's new lock puts it back.
    """
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    if aside.read_text(encoding="utf-8") != content:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _process_lives(pid: int) -> bool:
    if pid <= 0:
        return False
    if sys.platform == "win32":
        return _windows_process_lives(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _windows_process_lives(pid: int) -> bool:
    """Ask Windows for the process; `os.kill(pid, 0)` would send it Ctrl-C there."""
    import ctypes

    query_limited_information, still_active = 0x1000, 259
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    handle = kernel.OpenProcess(query_limited_information, False, pid)
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == still_active
