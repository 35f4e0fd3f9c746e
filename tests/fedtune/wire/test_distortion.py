from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ProtocolError
from fedtune.records import DistortionTable, MatrixForm
from fedtune.wire.distortion import distortion_json, read_distortion

TABLE = DistortionTable(
    "ab" * 32,
    (MatrixForm("q2", 64), MatrixForm("q4", 64, 8)),
    {"b": (1.5, math.inf), "a": (0.0, 2.5e-9)},
)


def written(folder: Path, tree: object) -> Path:
    path = folder / "distortion.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_distortion(written(tmp_path, distortion_json(TABLE))) == TABLE


def test_equal_tables_give_equal_text() -> None:
    turned = DistortionTable(TABLE.base_digest, TABLE.forms, dict(sorted(TABLE.errors.items())))
    assert json.dumps(distortion_json(turned)) == json.dumps(distortion_json(TABLE))


def _drop_forms(tree: dict[str, Any]) -> None:
    del tree["forms"]


def _other_format(tree: dict[str, Any]) -> None:
    tree["forms"][0]["format"] = "q5"


def _negative(tree: dict[str, Any]) -> None:
    tree["errors"]["a"][0] = -1.0


def _short(tree: dict[str, Any]) -> None:
    tree["errors"]["a"] = [1.0]


def _text(tree: dict[str, Any]) -> None:
    tree["errors"]["a"][0] = "much"


def _twice(tree: dict[str, Any]) -> None:
    tree["forms"][1] = tree["forms"][0]


def _layout(tree: dict[str, Any]) -> None:
    tree["layout"] = "fedtune-distortion-9"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_forms, "a field is missing"),
        (_other_format, r"format: expected one of fp32, .*, got 'q5'"),
        (_negative, r"error of a: expected 0\.\.1e\+300, got -1"),
        (_short, "a has 1 errors for 2 forms"),
        (_text, "could not convert string"),
        (_twice, "forms of a distortion table are unique"),
        (_layout, "is not a distortion table of layout fedtune-distortion-1"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    tree = distortion_json(TABLE)
    change(tree)
    with pytest.raises(ProtocolError, match=words):
        read_distortion(written(tmp_path, tree))


def test_a_file_that_is_not_there_names_the_verb_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"cannot be read .* fedtune measure RUN\.toml"):
        read_distortion(tmp_path / "none.json")


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "distortion.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ProtocolError, match="it is not JSON"):
        read_distortion(path)
