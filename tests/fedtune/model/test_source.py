"""Where a base model comes from: folders, shards, hub ids, and the digest that all sites share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedtune.errors import ModelError
from fedtune.model import source
from fedtune.model.source import base_digest, read_json, resolve_model, weight_files

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_config_and_weights_is_itself(stories260k: Path) -> None:
    assert resolve_model(str(stories260k)) == stories260k


def test_one_file_goes_before_an_index(folder: Path) -> None:
    (folder / "other.safetensors").touch()
    assert weight_files(folder) == (folder / "other.safetensors",)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}), encoding="utf-8"
    )
    (folder / "a.safetensors").touch()
    (folder / "b.safetensors").touch()
    assert weight_files(folder) == (folder / "a.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").touch()
    assert weight_files(folder) == (folder / "model.safetensors",)


def test_incomplete_folders_say_what_is_missing(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "has no *.safetensors file" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickle files (.bin, .pt), which can run code" in refusal(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "config.json is not valid JSON" in refusal(tmp_path)


def test_several_files_need_an_index(folder: Path) -> None:
    (folder / "a.safetensors").touch()
    (folder / "b.safetensors").touch()
    assert "several safetensors files (a.safetensors, b.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"x": "a.safetensors"}}, "lacks a.safetensors, which"),
        ({"weight_map": {"x": "../a.safetensors"}}, "which is not a safetensors file"),
        ({"weight_map": {"x": "..\\a.safetensors"}}, "which is not a safetensors file"),
        ({"weight_map": {"x": "a.bin"}}, "which is not a safetensors file"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, index: object, words: str) -> None:
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert words in refusal(folder)


def test_a_text_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "none")
    assert "there is no model folder" in text
    assert "not a hub id such as org/name" in text


def test_a_hub_id_without_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    asked: dict[str, object] = {}

    def offline(name: str, **options: object) -> str:
        asked.update(options, name=name)
        raise FileNotFoundError("Cannot find a cached snapshot\nand a page of advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError) as caught:
        resolve_model("org/name", "v2")
    assert str(caught.value) == (
        "model org/name cannot be had: no such folder here, not in the hub's cache, and no "
        "download (Cannot find a cached snapshot)"
    )
    assert (asked["name"], asked["revision"]) == ("org/name", "v2")
    assert "*.bin" not in str(asked["allow_patterns"])


def test_a_downloaded_folder_is_checked_as_any_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        resolve_model("org/name")
    (folder / "model.safetensors").touch()
    assert resolve_model("org/name") == folder


def test_the_digest_covers_config_names_and_content(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    seen = {base_digest(folder)}
    weights.write_bytes(b"weightz")
    os.utime(weights, ns=(1, 1))
    seen.add(base_digest(folder))
    (folder / "config.json").write_text('{"a": 1}', encoding="utf-8")
    seen.add(base_digest(folder))
    weights.rename(folder / "other.safetensors")
    seen.add(base_digest(folder))
    assert len(seen) == 4
    assert all(len(digest) == 64 for digest in seen)


def test_the_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        digests.add(base_digest(tmp_path / name))
    assert len(digests) == 1


def test_unchanged_files_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    first = base_digest(folder)
    monkeypatch.setattr(source, "_hash_files", lambda _: pytest.fail("hashed again"))
    assert base_digest(folder) == first


@pytest.fixture
def settled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as large, and as unchanged for a while."""
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(source, "_REMEMBERED_BYTES", 0)
    monkeypatch.setattr(source, "_SETTLED_S", -60.0)
    monkeypatch.setattr(source, "_digests", {})
    return folder


def test_a_remembered_digest_serves_the_next_process(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    first = base_digest(settled, notes)
    assert len(list(notes.iterdir())) == 1
    source._digests.clear()
    monkeypatch.setattr(source, "_hash_files", lambda _: pytest.fail("hashed again"))
    assert base_digest(settled, notes) == first


def test_a_changed_file_is_hashed_again_though_its_size_and_time_say_otherwise(
    settled: Path, tmp_path: Path
) -> None:
    notes, weights = tmp_path / "notes", settled / "model.safetensors"
    first = base_digest(settled, notes)
    stat = weights.stat()
    weights.write_bytes(b"weightz")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    source._digests.clear()
    assert base_digest(settled, notes) != first


def test_a_note_that_is_no_digest_is_written_anew(settled: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    first = base_digest(settled, notes)
    (note,) = notes.iterdir()
    for spoiled in (b"", first[:-1].encode(), b"\xff" * 64):
        note.write_bytes(spoiled)
        source._digests.clear()
        assert base_digest(settled, notes) == first
        assert note.read_text(encoding="ascii") == first


def test_a_base_that_is_small_or_has_just_changed_is_not_remembered(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_SETTLED_S", 3600.0), ("_REMEMBERED_BYTES", 1 << 20)):
        with monkeypatch.context() as patch:
            patch.setattr(source, name, value)
            source._digests.clear()
            base_digest(settled, tmp_path / "notes")
    assert not (tmp_path / "notes").exists()


def test_a_folder_that_takes_no_notes_is_no_error(settled: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert base_digest(settled, tmp_path / "file" / "notes") == base_digest(settled)


def test_other_files_of_the_folder_do_not_change_the_digest(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    first = base_digest(folder)
    (folder / "README.md").write_text("x", encoding="utf-8")
    assert base_digest(folder) == first


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        read_json(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path / "none.json")
