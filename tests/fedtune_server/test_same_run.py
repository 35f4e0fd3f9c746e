"""When a folder's run is the one that a command asks for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune.errors import RunError
from fedtune.records import Event
from fedtune.settings import RunConfig
from fedtune_server.ledger import Ledger
from fedtune_server.run_folder import RunFolder
from fedtune_server.same_run import MAY_DIFFER, first_difference

TREE: dict[str, dict[str, Any]] = {
    "model": {"path": "base"},
    "data": {"train": "rows.jsonl"},
    "fleet": {"any": {"count": 2, "memory": "1 GB"}},
}


def config(**changes: dict[str, Any]) -> RunConfig:
    tree = copy.deepcopy(TREE)
    for section, fields in changes.items():
        tree.setdefault(section, {}).update(fields)
    return parse_run_config(tree, "test")


def begun(path: Path, **changes: dict[str, Any]) -> None:
    """A run whose first round was saved, and whose process was killed."""
    with RunFolder.enter(path, config(**changes)) as folder:
        folder.run = "run-1"
        (folder.checkpoints / "round-0001.safetensors").write_bytes(b"x")
        folder.write_status("running", 1)


def test_a_written_configuration_is_the_one_that_was_written(tmp_path: Path) -> None:
    begun(tmp_path)
    with RunFolder.enter(tmp_path, config()) as folder:
        assert (folder.run, folder.reached) == ("run-1", 1)
        assert folder.read_status().run == "run-1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"seed": 3}}, "run.seed = 0, this command has 3"),
        ({"lora": {"targets": ["q_proj"]}}, "lora.targets = ['all-linear'], this command has ['q_"),
        ({"fleet": {"any": {"count": 3, "memory": "1 GB"}}}, "fleet.any.count = 2, this command"),
        ({"fleet": {"new": {"count": 1, "memory": "1 GB"}}}, "fleet.new.count = None, this comm"),
        ({"data": {"train": "other.jsonl"}}, "data.train = "),
    ],
)
def test_the_first_key_that_makes_another_run_is_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    begun(tmp_path)
    with pytest.raises(RunError) as refused:
        RunFolder.enter(tmp_path, config(**changes))
    assert f"already holds a run (running at round 1) with {words}" in str(refused.value)
    RunFolder.enter(tmp_path, config()).close()  # and it is not locked


def test_what_may_differ_is_no_difference_and_is_written_down(tmp_path: Path) -> None:
    changed = {
        "run": {"rounds": 3, "round_deadline_s": 5.0, "minimum_devices": 2},
        "rounds": {"repeats": 7},
        "simulation": {"devices_per_pass": 1},
        "data": {"test": "test.jsonl", "test_stride": 2},
        "deployment": {"sites": ["a", "b"], "minimum": 1, "deadline_s": 5.0, "slack": 2.0},
        "outputs": {"exports": [], "keep_checkpoints": 9},
    }
    begun(tmp_path)
    assert first_difference(config(), config(**changed)) is None
    named = {f"{section}.{key}" for section, keys in changed.items() for key in keys}
    assert named == set(MAY_DIFFER) - {"outputs.folder"}
    RunFolder.enter(tmp_path, config(**changed)).close()
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["run"]["rounds"] == 3


def test_a_folder_that_has_no_configuration_yet_has_nothing_to_lose(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running"', encoding="utf-8")
    with RunFolder.enter(tmp_path, config()) as folder:
        assert folder.read_status().round == 0


def test_a_run_without_its_configuration_is_not_touched(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match=r"already holds a run \(running at round 1\); undo"):
        RunFolder.enter(tmp_path, config())


def test_a_configuration_of_another_version_is_an_error_in_words(tmp_path: Path) -> None:
    begun(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree | {"future": {"key": 1}}), encoding="utf-8")
    with pytest.raises(RunError, match=r"cannot be continued: .*future.*; go on with the fedtune"):
        RunFolder.enter(tmp_path, config())


def test_a_damaged_status_does_not_stop_a_run_that_its_ledger_names(tmp_path: Path) -> None:
    begun(tmp_path)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append(Event("run_started", {"run": "run-1"}))
    (tmp_path / "status.json").write_text("", encoding="utf-8")
    with RunFolder.enter(tmp_path, config()) as folder:
        assert folder.run == "run-1"


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_run_that_only_planned_makes_place_for_another(tmp_path: Path, state: str) -> None:
    with RunFolder.enter(tmp_path, config()) as folder:
        (folder.checkpoints / "round-0000.safetensors").write_bytes(b"x")
        folder.write_status(state, 0)  # type: ignore[arg-type]
    with RunFolder.enter(tmp_path, config()) as folder:
        assert list(folder.checkpoints.iterdir())  # its own goes on
        folder.write_status(state, 0)  # type: ignore[arg-type]
    with RunFolder.enter(tmp_path, config(run={"seed": 1})) as folder:
        assert not list(folder.checkpoints.iterdir())
