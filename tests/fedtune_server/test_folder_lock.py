"""One folder, one coordinator; and none is locked out by a coordinator that is dead."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from fedtune.errors import RunError
from fedtune_server import folder_lock
from fedtune_server.folder_lock import NAME, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from fedtune_server.folder_lock import FolderLock
lock = FolderLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_coordinator_of_this_process_is_refused(tmp_path: Path) -> None:
    lock = FolderLock.acquire(tmp_path)
    with pytest.raises(RunError, match="is in use by another coordinator; wait for it, or choose"):
        FolderLock.acquire(tmp_path)
    lock.release()
    FolderLock.acquire(tmp_path).release()


def test_a_coordinator_in_another_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is in use"):
            FolderLock.acquire(tmp_path)
        other.kill()
        other.wait()
        FolderLock.acquire(tmp_path).release()


def test_a_left_over_lock_file_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / folder_lock.NAME).write_text("left over", encoding="utf-8")
    FolderLock.acquire(tmp_path).release()


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    ready = threading.Barrier(8)
    got: list[FolderLock] = []

    def take() -> None:
        ready.wait()
        try:
            got.append(FolderLock.acquire(tmp_path))
        except RunError:
            return

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_a_folder_that_is_not_there_is_an_error_in_words(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"cannot be locked .* choose an outputs.folder"):
        FolderLock.acquire(file)


def test_a_lock_that_is_held_for_an_instant_is_waited_for(tmp_path: Path) -> None:
    """`fedtune status` takes it to see whether a run goes on."""
    asking = FileLock(tmp_path / NAME, thread_local=False)
    asking.acquire()
    threading.Timer(0.1, asking.release).start()
    FolderLock.acquire(tmp_path).release()
