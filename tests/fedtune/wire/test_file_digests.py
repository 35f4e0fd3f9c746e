"""The digests of a run's files that its ledger keeps."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedtune.wire.file_digests import export_digests, export_files, file_digest


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def test_every_file_of_an_export_has_its_digest_by_its_path_from_the_run(tmp_path: Path) -> None:
    exports = tmp_path / "run" / "exports"
    expected = {
        "exports/merged/model.safetensors": _write(exports / "merged/model.safetensors", "a"),
        "exports/merged/deep/er.txt": _write(exports / "merged/deep/er.txt", "b"),
        "exports/model.onnx": _write(exports / "model.onnx", "c"),
        "exports/model.onnx.data": _write(exports / "model.onnx.data", "d"),
    }
    _write(exports / "other.txt", "e")
    paths = [str(exports / "merged"), str(exports / "model.onnx")]
    assert export_digests(tmp_path / "run", paths) == expected
    assert file_digest(exports / "model.onnx") == expected["exports/model.onnx"]


def test_what_is_missing_has_no_files(tmp_path: Path) -> None:
    assert export_files(tmp_path / "merged") == []
    assert export_digests(tmp_path, [str(tmp_path / "merged")]) == {}
