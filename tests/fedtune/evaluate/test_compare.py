"""Base and merged model are measured on the same samples, in full precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import parse_run_config
from fedtune.data.rows import Row, read_rows
from fedtune.data.samples import SampleBuilder, build_samples
from fedtune.errors import DataError
from fedtune.evaluate.compare import compare_on_rows
from fedtune.evaluate.perplexity import held_out_loss
from fedtune.model.load import load_base
from fedtune.model.tokenizer import load_tokenizer
from fedtune.settings import RunConfig


def config_of(model: Path, rows: Path, **data: Any) -> RunConfig:
    classifying = data.get("format") == "text-label"
    tree = {
        "model": {
            "path": str(model),
            "task": "sequence-classification" if classifying else "causal-lm",
        },
        "data": {"train": str(rows), "max_tokens": 40, **data},
        "fleet": {"any": {"count": 1, "memory": "1 GB"}},
    }
    return parse_run_config(tree, "test")


@pytest.fixture
def merged(tiny_llama: Path, tmp_path: Path) -> Path:
    """The base with one matrix changed."""
    model = load_base(tiny_llama, "causal-lm")
    torch.manual_seed(1)
    with torch.no_grad():
        up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        up.add_(torch.randn_like(up), alpha=0.3)
    folder = tmp_path / "merged"
    model.save_pretrained(folder)
    return folder


def loss_of(folder: Path, base: Path, rows: list[Row], config: RunConfig) -> float:
    samples = build_samples(rows, SampleBuilder(load_tokenizer(base), config.data)).samples
    return held_out_loss(load_base(folder, "causal-lm"), samples, batch_size=1, pad_id=2).loss


def test_both_models_are_measured_on_the_rows(
    tiny_llama: Path, merged: Path, colour_rows: Path, tmp_path: Path
) -> None:
    rows = list(read_rows(colour_rows, ["prompt", "response"]))[:9]
    config = config_of(tiny_llama, colour_rows)
    event = compare_on_rows(config, merged, rows, tmp_path)
    assert event.kind == "tested"
    found = event.fields
    assert found["base_loss"] == pytest.approx(loss_of(tiny_llama, tiny_llama, rows, config))
    assert found["merged_loss"] == pytest.approx(loss_of(merged, tiny_llama, rows, config))
    assert found["base_loss"] != pytest.approx(found["merged_loss"], abs=1e-3)
    answers = [row.text("response") for row in rows]
    assert found["tokens"] == sum(len(answer) + 1 for answer in answers)  # bytes, and the end
    assert (found["rows"], found["accuracy"]) == (9, None)


def test_an_unchanged_model_is_worth_what_the_base_is(
    tiny_llama: Path, colour_rows: Path, tmp_path: Path
) -> None:
    rows = list(read_rows(colour_rows, ["prompt", "response"]))[:5]
    found = compare_on_rows(config_of(tiny_llama, colour_rows), tiny_llama, rows, tmp_path).fields
    assert found["merged_loss"] == pytest.approx(found["base_loss"], rel=1e-6)


def test_a_base_has_no_head_so_only_the_merged_classifier_is_measured(
    tiny_bert: Path, letter_rows: Path, tmp_path: Path
) -> None:
    labels = ("a", "b", "c")
    torch.manual_seed(3)
    model = load_base(tiny_bert, "sequence-classification", labels)
    with torch.no_grad():  # always says b, and is rather sure of it
        model.get_parameter("classifier.weight").zero_()
        model.get_parameter("classifier.bias").copy_(torch.tensor([0.0, 2.0, 0.0]))
    model.save_pretrained(tmp_path / "merged")
    (tmp_path / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    rows = list(read_rows(letter_rows, ["text", "label"]))[:20]
    config = config_of(tiny_bert, letter_rows, format="text-label")
    found = compare_on_rows(config, tmp_path / "merged", rows, tmp_path).fields
    share = sum(row.label("label") == "b" for row in rows) / 20
    assert 0 < share < 1
    assert found["base_loss"] is None
    assert found["accuracy"] == pytest.approx(share)
    right = math.log(2 + math.exp(2.0)) - 2.0
    assert found["merged_loss"] == pytest.approx(right + 2.0 * (1 - share), rel=1e-5)
    assert (found["rows"], found["tokens"]) == (20, 20)


def test_rows_without_anything_to_learn_are_refused(
    tiny_llama: Path, colour_rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 99, "response": "y"}) + "\n", encoding="utf-8")
    rows = list(read_rows(path, ["prompt", "response"]))
    with pytest.raises(DataError, match="none of the 0 held-out samples carries loss"):
        compare_on_rows(config_of(tiny_llama, colour_rows), tiny_llama, rows, tmp_path)
