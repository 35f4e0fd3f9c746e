"""A run's folder is held by one coordinator, and a run in it is never lost by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune.wire import durable
from fedtune_server.run_folder import RunFolder, write_json

LOCK = ".lock"


def finished_run(path: Path) -> None:
    with RunFolder.create(path) as folder:
        folder.write_json("config.json", {"run": {"name": "a"}})
        folder.write_json("labels.json", ["no", "yes"])
        folder.ledger.write_text("{}\n", encoding="utf-8")
        for name in (
            "checkpoints/round-0003.safetensors",
            "checkpoints/round-0003.safetensors.sha256",
            "tensorboard/events.out.tfevents.1.host",
            "exports/merged/model.safetensors",
            "exports/peft/adapter_config.json",
            "exports/model.onnx",
            "exports/model.onnx.data",
            "exports/.merged.partial/model.safetensors",
        ):
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
        folder.write_status("finished", 3)


def test_a_new_folder_is_running_at_round_0_and_has_its_subfolders(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs" / "a") as folder:
        status = folder.read_status()
        assert (status.state, status.round) == ("running", 0)
        assert status.updated.endswith("+00:00")
        assert folder.checkpoints.is_dir()
        assert folder.exports.is_dir()
        assert folder.holds_run


def test_a_folder_that_holds_a_run_is_refused_with_its_state_and_the_ways_out(
    tmp_path: Path,
) -> None:
    finished_run(tmp_path)
    with pytest.raises(
        RunError,
        match=r"already holds a run \(finished at round 3\); .*outputs.folder.*--overwrite",
    ):
        RunFolder.create(tmp_path)
    assert (tmp_path / "exports/model.onnx").exists()
    RunFolder.create(tmp_path, overwrite=True).close()  # the refusal left it unlocked


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    finished_run(tmp_path)
    own = ("notes.txt", "checkpoints/notes.txt", "exports/notes.txt", "data/train.jsonl")
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with RunFolder.create(tmp_path, overwrite=True) as folder:
        assert folder.read_status().round == 0
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted([*own, LOCK, "status.json"])


def test_a_folder_with_other_files_only_takes_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with RunFolder.create(tmp_path):
        assert (tmp_path / "notes.txt").exists()


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"cannot be created .* choose another outputs\.folder"):
        RunFolder.create(tmp_path / "file" / "a")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "asleep", "round": 1, "updated": ""}'])
def test_a_damaged_status_is_an_error_in_words(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    folder.status.write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"status.json.*(not a status file|expected state running)"):
        folder.read_status()
    with pytest.raises(RunError, match="its state is unknown"):
        RunFolder.create(tmp_path)


def test_a_reader_never_sees_a_part_of_a_json_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1, "bad": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 1, "bad": None}

    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"value": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["value"] == 1


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_run_that_ended_before_its_first_round_is_replaced(tmp_path: Path, state: str) -> None:
    with RunFolder.create(tmp_path) as folder:
        folder.ledger.write_text("old\n", encoding="utf-8")
        folder.write_status(state, 0)  # type: ignore[arg-type]
    with RunFolder.create(tmp_path) as folder:
        assert not folder.ledger.exists()
        assert folder.read_status().state == "running"


def test_a_failed_run_with_a_checkpoint_is_kept(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path) as folder:
        (folder.checkpoints / "round-0001.safetensors").write_bytes(b"x")
        folder.write_status("failed", 1)
    with pytest.raises(RunError, match="already holds a run"):
        RunFolder.create(tmp_path)
