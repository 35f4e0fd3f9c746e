"""The held-out loss of a whole model, such as a merged export, loaded by `transformers` alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedtune.errors import DataError
from fedtune.model.load import quiet_transformers
from fedtune.model.loss import TokenisedSample, loss_sum, loss_units, prepare
from fedtune.records import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """How well a model predicts held-out samples.

    Attributes:
        loss: mean cross-entropy in nats, per token that carries loss or per classified sample.
        tokens: how many tokens, or samples when classifying, the mean is over.
        accuracy: share of samples whose best class is theirs; None for language modelling.
    """

    loss: float
    tokens: int
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss)


def held_out_loss(
    model: PreTrainedModel,
    samples: Sequence[TokenisedSample],
    batch_size: int = 16,
    pad_id: int = 0,
    task: TaskName = "causal-lm",
    before_batch: Callable[[], None] | None = None,
) -> EvaluationReport:
    """Mean cross-entropy of a model over samples, without training it.

    The result does not depend on `batch_size` beyond float32 rounding.

    Args:
        samples: for language modelling, `loss_mask[t]` says that token t is predicted with loss
            from the tokens before it.
        batch_size: samples in one forward pass.
        pad_id: token id that fills a batch on the right.
        before_batch: called before every batch; may raise to stop.

    Raises:
        DataError: no sample carries loss.
    """
    units = loss_units(samples, task)
    if units == 0:
        raise DataError(f"none of the {len(samples)} held-out samples carries loss")
    ordered = sorted(samples, key=lambda sample: len(sample.tokens), reverse=True)
    was_training = model.training
    total, correct = 0.0, 0
    model.eval()
    try:
        for start in range(0, len(ordered), batch_size):
            if before_batch is not None:
                before_batch()
            batch = prepare(model, ordered[start : start + batch_size], pad_id, task)
            with torch.no_grad():
                found = loss_sum(model, batch, task)
            total += found.total.item()
            correct += found.correct
    finally:
        model.train(was_training)
    accuracy = correct / units if task == "sequence-classification" else None
    return EvaluationReport(total / units, units, accuracy)


def evaluate_folder(
    folder: Path,
    samples: Sequence[TokenisedSample],
    batch_size: int = 16,
    pad_id: int = 0,
    task: TaskName = "causal-lm",
) -> EvaluationReport:
    """Load a model folder in float32, with `transformers` alone, and measure its held-out loss.

    Raises:
        DataError: no sample carries loss.
    """
    # Imported here: a device measures its own backbone and needs a second less to start without.
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    with quiet_transformers():
        model = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return held_out_loss(model, samples, batch_size, pad_id, task)
