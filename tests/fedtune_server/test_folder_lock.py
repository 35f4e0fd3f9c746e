"""Two coordinators never share a folder, and a dead one does not block it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune_server import folder_lock
from fedtune_server.folder_lock import FolderLock


def write_lock(folder: Path, pid: int, host: str | None = None) -> Path:
    path = folder / folder_lock.NAME
    owner = {"pid": pid, "host": socket.gethostname() if host is None else host}
    path.write_text(json.dumps(owner), encoding="utf-8")
    return path


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_coordinator_in_this_process_is_refused(tmp_path: Path) -> None:
    lock = FolderLock.acquire(tmp_path)
    with pytest.raises(RunError, match=rf"in use by process {os.getpid()} on .*delete .*\.lock"):
        FolderLock.acquire(tmp_path)
    lock.release()
    FolderLock.acquire(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_keeps_its_lock(tmp_path: Path) -> None:
    write_lock(tmp_path, os.getppid())
    with pytest.raises(RunError, match=f"in use by process {os.getppid()}"):
        FolderLock.acquire(tmp_path)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, dead_pid: int) -> None:
    path = write_lock(tmp_path, dead_pid)
    lock = FolderLock.acquire(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_an_own_process_id_from_before_a_restart_is_taken_over(tmp_path: Path) -> None:
    # In a container the coordinator has the same small process id after each start.
    write_lock(tmp_path, os.getpid())
    FolderLock.acquire(tmp_path).release()


def test_another_machines_lock_stands(tmp_path: Path, dead_pid: int) -> None:
    write_lock(tmp_path, dead_pid, host="another-machine")
    with pytest.raises(RunError, match="on another-machine"):
        FolderLock.acquire(tmp_path)


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"pid": "x", "host": "y"}'])
def test_a_lock_that_was_never_completed_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / folder_lock.NAME).write_text(text, encoding="utf-8")
    FolderLock.acquire(tmp_path).release()


def test_a_new_lock_is_put_back_when_it_replaced_the_stale_one_meanwhile(
    tmp_path: Path, dead_pid: int
) -> None:
    path = write_lock(tmp_path, dead_pid)
    stale = path.read_text(encoding="utf-8")
    write_lock(tmp_path, os.getppid())
    fresh = path.read_text(encoding="utf-8")
    folder_lock._remove_stale(path, stale)
    assert path.read_text(encoding="utf-8") == fresh
    assert [p.name for p in tmp_path.iterdir()] == [folder_lock.NAME]


def test_of_many_that_take_over_a_stale_lock_one_gets_it(tmp_path: Path, dead_pid: int) -> None:
    write_lock(tmp_path, dead_pid)
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
