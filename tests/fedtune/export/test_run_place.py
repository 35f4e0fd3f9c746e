"""Finding a run by its path or its name, and asking whether a coordinator is at work in it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune.export.run_place import coordinator_at_work, find_run, holds_run, run_place
from fedtune_server.folder_lock import FolderLock


@pytest.fixture(autouse=True)
def _two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/first", "runs/second", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "status.json").write_text("{}", encoding="utf-8")
    (tmp_path / "runs" / "empty").mkdir()


def test_a_run_has_a_path_or_a_name_below_runs() -> None:
    assert find_run("first") == Path("runs/first")
    assert find_run("runs/first") == Path("runs/first")
    assert find_run("elsewhere") == Path("elsewhere")
    assert run_place("later") == Path("runs/later")
    assert run_place("out/later") == Path("out/later")
    assert holds_run(Path("elsewhere"))
    assert not holds_run(Path("runs/empty"))


def test_a_name_without_a_run_is_one_line_that_lists_the_runs() -> None:
    with pytest.raises(RunError, match=r"no run is at runs.third; runs here: first, second$"):
        find_run("third")
    with pytest.raises(RunError, match=r"runs.empty is a folder without a run; runs here"):
        find_run("runs/empty")


def test_without_any_run_the_line_says_what_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(RunError, match="name the folder of a run, such as runs/demo"):
        find_run("third")


def test_a_held_lock_says_that_a_coordinator_is_at_work() -> None:
    folder = Path("runs/first")
    assert coordinator_at_work(folder) is False
    assert not (folder / ".lock").exists(), "asking writes nothing"
    lock = FolderLock.acquire(folder)
    assert coordinator_at_work(folder) is True
    lock.release()
    assert coordinator_at_work(folder) is False
    FolderLock.acquire(folder).release()  # asking keeps nothing


def test_the_lock_of_a_killed_coordinator_is_free() -> None:
    folder = Path("runs/first")
    holding = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from filelock import FileLock; "
            f"lock = FileLock({str(folder.resolve() / '.lock')!r}); lock.acquire(); "
            "print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    with holding:
        assert holding.stdout is not None
        assert holding.stdout.readline().strip() == b"held"
        assert coordinator_at_work(folder) is True
        holding.kill()
        holding.wait()
    until = time.monotonic() + 10
    while coordinator_at_work(folder) and time.monotonic() < until:
        time.sleep(0.01)
    assert coordinator_at_work(folder) is False
