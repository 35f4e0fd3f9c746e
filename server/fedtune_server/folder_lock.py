"""A lock, so that two coordinators never write to one run folder.

The operating system holds it for the process, through the package filelock, and lets go when the
process ends, however it ends: there is no stale lock to take over. The file `.lock` only names
what is locked; whether it is there says nothing.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from fedtune.errors import RunError

NAME = ".lock"

_WAIT_S = 0.5
"""Whoever asks whether a run goes on (`fedtune status`) holds the lock for an instant."""


class FolderLock:
    """The right to write to a folder."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    @classmethod
    def acquire(cls, folder: Path) -> FolderLock:
        """Take the lock of a folder.

        Raises:
            RunError: another coordinator has it, or the folder cannot be locked.
        """
        # Not bound to a thread: who opened the folder may close it from another one.
        lock = FileLock(folder.resolve() / NAME, timeout=_WAIT_S, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{folder} is in use by another coordinator; wait for it, or choose another "
                "outputs.folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise RunError(
                f"run folder {folder} cannot be locked ({error}); choose an outputs.folder that "
                "can be written and is on a local disk"
            ) from None
        return cls(lock)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()
