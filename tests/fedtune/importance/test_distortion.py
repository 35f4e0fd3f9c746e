from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import ModelError
from fedtune.model.shapes import read_shapes
from fedtune.plan.mixing import candidate_forms
from fedtune.records import MatrixForm, MatrixShape

pytest.importorskip("torch")

from fedtune.importance import distortion as measured
from fedtune.importance.distortion import base_distortion

FORMS = candidate_forms(("q2", "q4"), 4)


def test_every_matrix_of_a_base_is_measured_in_every_form(tiny_llama: Path, tmp_path: Path) -> None:
    shapes = read_shapes(tiny_llama, ("all-linear",))
    table = base_distortion(tiny_llama, shapes, FORMS, tmp_path)
    assert table.base_digest == shapes.digest
    assert table.forms == FORMS
    assert list(table.errors) == [matrix.name for matrix in shapes.matrices]
    q2, repaired = FORMS.index(MatrixForm("q2", 64)), FORMS.index(MatrixForm("q2", 64, 4))
    assert all(errors[repaired] < errors[q2] for errors in table.errors.values())


def test_what_was_measured_once_is_not_measured_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = read_shapes(tiny_llama, ("all-linear",))
    asked: list[list[MatrixForm]] = []
    original = measured.measure_distortion

    def counting(matrices, forms, digest, report):  # type: ignore[no-untyped-def]
        asked.append(list(forms))
        return original(matrices, forms, digest, report)

    monkeypatch.setattr(measured, "measure_distortion", counting)
    few = base_distortion(tiny_llama, shapes, FORMS[:2], tmp_path)
    more = base_distortion(tiny_llama, shapes, FORMS, tmp_path)
    again = base_distortion(tiny_llama, shapes, FORMS[::-1], tmp_path)
    assert asked == [list(FORMS[:2]), list(FORMS[2:])]
    assert again == more
    assert all(row == more.errors[name][:2] for name, row in few.errors.items())


def test_a_damaged_table_is_measured_again(tiny_llama: Path, tmp_path: Path) -> None:
    shapes = read_shapes(tiny_llama, ("q_proj",))
    first = base_distortion(tiny_llama, shapes, FORMS[:1], tmp_path)
    path = tmp_path / f"{shapes.digest}.json"
    path.write_text(json.dumps({"layout": "other"}), encoding="utf-8")
    assert base_distortion(tiny_llama, shapes, FORMS[:1], tmp_path) == first


def test_other_targets_of_the_same_base_are_measured_anew(tiny_llama: Path, tmp_path: Path) -> None:
    base_distortion(tiny_llama, read_shapes(tiny_llama, ("q_proj",)), FORMS[:1], tmp_path)
    whole = read_shapes(tiny_llama, ("all-linear",))
    table = base_distortion(tiny_llama, whole, FORMS[:1], tmp_path)
    assert len(table.errors) == len(whole.matrices)


def test_progress_is_told_when_measuring_lasts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = read_shapes(tiny_llama, ("all-linear",))
    told: list[tuple[int, int]] = []
    base_distortion(tiny_llama, shapes, FORMS[:1], tmp_path / "a", lambda *at: told.append(at))
    assert told == []
    monkeypatch.setattr(measured, "_QUIET_S", 0.0)
    base_distortion(tiny_llama, shapes, FORMS[:1], tmp_path / "b", lambda *at: told.append(at))
    assert told == [(done, 14) for done in range(1, 15)]


def test_a_matrix_that_the_base_lacks_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    shapes = read_shapes(tiny_llama, ("q_proj",))
    more = replace(shapes, matrices=(*shapes.matrices, MatrixShape("layers.9.q_proj", 2, 2, 9)))
    with pytest.raises(ModelError, match=r"has no matrix layers\.9\.q_proj\.weight"):
        base_distortion(tiny_llama, more, FORMS[:1], tmp_path)
