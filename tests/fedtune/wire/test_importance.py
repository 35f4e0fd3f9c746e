"""An importance report as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ProtocolError
from fedtune.records import ImportanceReport
from fedtune.wire.importance import importance_json, read_importance

REPORT = ImportanceReport({"q": (0.5, 0.25), "down": (0.125,)}, 4711, "spectrum")
DIGEST = "d" * 64


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(importance_json(REPORT, DIGEST) | changes), encoding="utf-8")
    return path


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    assert read_importance(written(tmp_path / "i.json"), DIGEST) == REPORT


def test_equal_reports_are_written_alike() -> None:
    turned = ImportanceReport(dict(reversed(REPORT.gain_per_rank.items())), 4711, "spectrum")
    assert json.dumps(importance_json(turned, DIGEST)) == json.dumps(
        importance_json(REPORT, DIGEST)
    )


def test_a_report_of_another_base_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "i.json")
    with pytest.raises(ProtocolError, match=r"another base model: expected digest eeeeeeeeeeee"):
        read_importance(path, "e" * 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "other"}, "layout fedtune-importance-1"),
        ({"method": "guess"}, "method: expected one of"),
        ({"tokens": -1}, "tokens: expected 0"),
        ({"tokens": True}, "a field is missing"),
        ({"gain_per_rank": []}, "a field is missing"),
        ({"gain_per_rank": {"q": [1.0, -1.0]}}, "gain of 'q': expected 0"),
        ({"gain_per_rank": {"q": [float("nan")]}}, "expected a finite number"),
        ({"gain_per_rank": {"q": ["1"]}}, "a field is missing"),
        ({"gain_per_rank": {"q": [1.0] * 5000}}, "expected at most 4096 entries"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        read_importance(written(tmp_path / "i.json", **changes), DIGEST)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        read_importance(tmp_path / "none.json", DIGEST)
    (tmp_path / "i.json").write_text("{", encoding="utf-8")
    with pytest.raises(ProtocolError, match="it is not JSON"):
        read_importance(tmp_path / "i.json", DIGEST)
