"""What a device carries is there for the round after it, and for a round that is played again."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from fedtune.errors import RunError
from fedtune_client.round_states import RoundStates, prune_runs, state_folder

Tensors = dict[str, torch.Tensor]


def left(round: int) -> Tensors:
    return {"optimizer/squares.up.a": torch.full((3,), float(round)), "n": torch.tensor(round)}


def number(states: object) -> int | None:
    assert isinstance(states, dict)
    return int(states["n"]) if states else None


@pytest.fixture(params=["memory", "disk"])
def states(request: pytest.FixtureRequest, tmp_path: Path) -> RoundStates:
    return RoundStates(tmp_path / "device" if request.param == "disk" else None)


def test_a_round_starts_from_the_latest_before_it(states: RoundStates) -> None:
    assert states.before("run-1", 1) == {}
    for round in (1, 2, 5):
        states.keep("run-1", round, left(round))
    assert [number(states.before("run-1", round)) for round in (1, 2, 3, 5, 6, 9)] == [
        None, 1, 2, 2, 5, 5,
    ]  # fmt: skip
    torch.testing.assert_close(states.before("run-1", 6), left(5))


def test_a_round_that_is_played_again_drops_what_came_after_it(states: RoundStates) -> None:
    for round in (1, 2, 3):
        states.keep("run-1", round, left(round))
    states.keep("run-1", 2, left(20))
    assert number(states.before("run-1", 4)) == 20


def test_the_last_four_rounds_of_one_run_are_kept(states: RoundStates, tmp_path: Path) -> None:
    for round in range(1, 8):
        states.keep("run-1", round, left(round))
    assert number(states.before("run-1", 5)) == 4
    assert states.before("run-1", 4) == {}
    assert states.before("run-2", 9) == {}
    states.keep("run-2", 1, left(1))
    assert states.before("run-1", 9) == {}
    files = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert files in ([], ["round-0001.safetensors"])


def test_another_process_finds_them_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    first = RoundStates(tmp_path)
    for round in (1, 2):
        first.keep("run-1", round, left(round))
    assert number(RoundStates(tmp_path).before("run-1", 3)) == 2
    path = tmp_path / "round-0002.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert number(RoundStates(tmp_path).before("run-1", 3)) == 1


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = RoundStates(tmp_path)
    states.keep("run-1", 1, left(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fedtune.wire.durable.os.fsync", full)
    with pytest.raises(RunError, match=r"round-0002.safetensors cannot be written .* free some"):
        states.keep("run-1", 2, left(2))
    assert number(states.before("run-1", 3)) == 1


def test_devices_of_odd_names_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a:b", "..", "x" * 200, "Süd", "CON"]
    folders = [state_folder(tmp_path, name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder.parent == tmp_path
        folder.mkdir()


def test_what_old_runs_left_is_removed(tmp_path: Path) -> None:
    now = time.time()

    def run(name: str, days_ago: float) -> Path:
        folder = state_folder(tmp_path, name)
        RoundStates(folder).keep(name, 1, left(1))
        os.utime(folder, (now - 86_400 * days_ago,) * 2)
        return folder

    current = run("current", 90)
    recent = [run(f"run-{days}", days) for days in range(1, 10)]
    old = run("old", 31)
    (tmp_path / "not-ours").mkdir()
    prune_runs(tmp_path, current)
    assert {path for path in tmp_path.iterdir() if path.name != "not-ours"} == {
        current, *recent[:7]
    }  # fmt: skip
    assert (tmp_path / "not-ours").is_dir()
    assert not old.exists()
    os.utime(recent[0], (now - 86_400 * 40,) * 2)
    prune_runs(tmp_path, current)
    assert not recent[0].exists()
    prune_runs(tmp_path / "none", current)
