"""Events become JSON that every reader understands."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

import numpy as np
import pytest

from fedtune.records import Event
from fedtune.wire.events import event_object, json_line, plain


def test_an_event_is_one_flat_object_with_its_kind_first() -> None:
    event = Event("round_finished", {"round": 3, "train_loss": 2.5, "name": "Süd"})
    line = json_line(event_object(event))
    assert line == '{"kind":"round_finished","round":3,"train_loss":2.5,"name":"Süd"}'


def test_numbers_that_are_not_finite_become_null_at_any_depth() -> None:
    value = {"a": float("nan"), "b": [float("inf"), {"c": np.float32("-inf")}]}
    assert json.loads(json_line(value)) == {"a": None, "b": [None, {"c": None}]}


def test_numpy_numbers_paths_tuples_and_sets_have_a_json_form() -> None:
    value = {"n": np.int64(3), "f": np.float32(0.5), "p": PurePosixPath("a/b"), "t": (1, 2)}
    assert plain(value) == {"n": 3, "f": 0.5, "p": "a/b", "t": [1, 2]}
    assert plain({"b", "a"}) == ["a", "b"]


@pytest.mark.parametrize("value", [b"bytes", object()])
def test_a_value_without_json_form_is_an_error(value: object) -> None:
    with pytest.raises(TypeError, match="expected a JSON value, got"):
        plain({"x": value})


def test_a_field_called_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="must not have a field called kind"):
        event_object(Event("warning", {"kind": "x"}))
