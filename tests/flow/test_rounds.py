"""Whole runs whose rounds do not wait for all: real training, on a virtual clock."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.wire.checkpoint import latest_checkpoint

Tree = dict[str, dict[str, Any]]
Play = Callable[[Tree], Any]


@pytest.fixture
def slow(tree: Tree) -> Tree:
    """Four equal devices, which take unequal times."""
    tree["fleet"] = {"any": {"count": 4, "memory": "1.5 MB", "formats": ["int8"]}}
    tree["importance"] = {"method": "uniform"}
    tree["simulation"] |= {"delay": "pareto", "delay_spread": 1.0}
    tree["run"]["rounds"] = 4
    return tree


def tensors(folder: Path) -> bytes:
    """Of the last checkpoint; its other contents name the run."""
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def in_folder(tree: Tree, folder: Path) -> Tree:
    changed = copy.deepcopy(tree)
    changed["outputs"]["folder"] = str(folder)
    return changed


@pytest.mark.parametrize(
    "rounds", [{"mode": "async", "close_count": 2}, {"close_fraction": 0.5}], ids=str
)
def test_how_many_train_in_a_pass_changes_no_byte_and_no_time(
    slow: Tree, play: Play, tmp_path: Path, rounds: dict[str, Any]
) -> None:
    slow["rounds"] = rounds
    found = []
    for devices_per_pass in (1, 16):
        slow["simulation"]["devices_per_pass"] = devices_per_pass
        played = play(in_folder(slow, tmp_path / f"by {devices_per_pass}"))
        times = [f["virtual_seconds"] for f in played.all("round_finished")]
        who = [(f["round"], f["device"], f["staleness"]) for f in played.all("device_reported")]
        found.append((tensors(played.folder), times, who))
    assert found[0] == found[1]
    assert max(staleness for _, _, staleness in found[0][2]) > 0


def test_rounds_that_do_not_wait_take_less_time_and_the_loss_falls(
    slow: Tree, play: Play, tmp_path: Path
) -> None:
    seconds = {}
    for name, rounds in {"all": {}, "some": {"close_count": 2}}.items():
        slow["rounds"] = rounds
        played = play(in_folder(slow, tmp_path / name))
        finished = played.one("run_finished")
        assert finished["held_out_loss_after"] < finished["held_out_loss_before"]
        seconds[name] = sum(f["virtual_seconds"] for f in played.all("round_finished"))
        planned = played.all("round_finished")[0]["planned_seconds"]
        assert seconds[name] > 0.5 * planned * 0.5  # no factor is below a half
    assert seconds["some"] < seconds["all"]


def test_a_deadline_counts_virtual_seconds(slow: Tree, play: Play) -> None:
    slow["rounds"] = {"late": "refuse"}
    slow["run"] |= {"round_deadline_s": 0.06, "rounds": 3}
    played = play(slow)
    rounds = played.all("round_finished")
    assert max(f["virtual_seconds"] for f in rounds) == pytest.approx(0.06)
    reasons = {f["reason"] for f in played.all("device_refused")}
    assert reasons == {"no answer within 0.06 s"}
    assert sum(f["refused"] + f["reported"] for f in rounds) == 12


def test_devices_take_turns_and_no_more_than_they_may(tree: Tree, play: Play) -> None:
    tree["run"] |= {"devices_per_round": 2, "rounds": 3}
    tree["fleet"] = {
        "often": {"count": 3, "memory": "1.5 MB", "formats": ["int8"]},
        "once": {"count": 1, "memory": "1.5 MB", "formats": ["int8"], "rounds_max": 1},
    }
    played = play(tree)
    rounds = [set(f["devices"]) for f in played.all("round_started")]  # type: ignore[call-overload]
    assert len(rounds[0] | rounds[1]) == 4
    once = {r["device"] for r in played.all("site_reported") if r["device_class"] == "once"}
    assert sum(bool(once & names) for names in rounds) == 1
