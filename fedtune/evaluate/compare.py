"""Base and merged model on the same held-out rows: what the run was worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedtune.data.rows import Row
from fedtune.data.samples import SampleBuilder, build_samples
from fedtune.evaluate.perplexity import EvaluationReport, evaluate_folder, held_out_loss
from fedtune.model.load import load_base
from fedtune.model.source import resolve_model
from fedtune.model.tokenizer import load_tokenizer, pad_id
from fedtune.records import Event
from fedtune.settings import RunConfig


def compare_on_rows(config: RunConfig, merged: Path, rows: Sequence[Row], folder: Path) -> Event:
    """Measure base and merged model in full precision; returns the event `tested`.

    A base has no head for classification, so there only the merged model is measured.

    Args:
        merged: folder of the merged model.
        rows: held-out rows, which no site has seen.
        folder: the run folder; holds the labels of a classification.

    Raises:
        DataError: no row makes a sample that carries loss.
    """
    base = resolve_model(config.model.path, config.model.revision)
    labels: tuple[str, ...] = ()
    if config.model.task == "sequence-classification":
        labels = tuple(json.loads((folder / "labels.json").read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(base)
    samples = build_samples(rows, SampleBuilder(tokenizer, config.data, labels)).samples
    pad = pad_id(tokenizer)
    after = evaluate_folder(merged, samples, pad_id=pad, task=config.model.task)
    before: EvaluationReport | None = None
    if config.model.task == "causal-lm":
        before = held_out_loss(load_base(base, "causal-lm"), samples, pad_id=pad)
    return Event(
        "tested",
        {
            "rows": len(rows),
            "tokens": after.tokens,
            "base_loss": before.loss if before else None,
            "merged_loss": after.loss,
            "accuracy": after.accuracy,
        },
    )
