"""The losses of the two tasks, as sums and counts, computed on rows that carry loss and no others.

Sums and counts, not means: micro-batches then add up to exactly the loss of the whole batch, and
devices add up to exactly the loss of the fleet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedtune.records import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESHAPED_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Config keys of models that change the logits after the output matrix; they take the long way."""


class TokenisedSample(Protocol):
    """What a sample must have to be trained or measured on."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...
    @property
    def label(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples padded on the right to the longest of them.

    Attributes:
        loss_mask: which tokens are predicted with loss (the token itself, not its position's
            output).
        labels: class index, -1 when there is none.
    """

    tokens: Int[Tensor, "batch length"]
    present: Bool[Tensor, "batch length"]
    loss_mask: Bool[Tensor, "batch length"]
    labels: Int[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class LossSum:
    """A sum of losses with its graph, over how many units, and how many were right.

    Attributes:
        units: tokens for causal language modelling, samples for classification.
        correct: arg-max hits among the units.
    """

    total: Float[Tensor, ""]
    units: int
    correct: int


def collate(samples: Sequence[TokenisedSample], pad_id: int, device: torch.device) -> Batch:
    """Pad samples on the right and move them to the device."""
    length = max(len(sample.tokens) for sample in samples)
    shape = (len(samples), length)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    present = np.zeros(shape, dtype=np.bool_)
    loss_mask = np.zeros(shape, dtype=np.bool_)
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        tokens[row, :size] = sample.tokens
        present[row, :size] = True
        loss_mask[row, :size] = sample.loss_mask
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    tensors = (torch.from_numpy(array).to(device) for array in (tokens, present, loss_mask, labels))
    return Batch(*tensors)


def loss_units(samples: Sequence[TokenisedSample], task: TaskName) -> int:
    """What `LossSum.units` will be, without computing the loss."""
    if task == "sequence-classification":
        return len(samples)
    return sum(int(sample.loss_mask[1:].sum()) for sample in samples)


def loss_sum(model: PreTrainedModel, batch: Batch, task: TaskName) -> LossSum:
    """Cross-entropy summed over the batch's units.

    For language modelling the output at position t-1 predicts token t; the output matrix is
    applied only at positions whose next token carries loss. Padding stands on the right, where a
    causal model cannot see it, so no attention mask is needed.
    """
    if task == "sequence-classification":
        logits = model(input_ids=batch.tokens, attention_mask=batch.present.long()).logits
        targets = batch.labels
    else:
        rows = batch.loss_mask[:, 1:]
        logits = _next_token_logits(model, batch.tokens, rows)
        targets = batch.tokens[:, 1:][rows]
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    correct = int((logits.detach().argmax(-1) == targets).sum())
    return LossSum(total, int(targets.numel()), correct)


def _next_token_logits(
    model: PreTrainedModel, tokens: Int[Tensor, "batch length"], rows: Bool[Tensor, "batch rest"]
) -> Float[Tensor, "rows vocabulary"]:
    head = model.get_output_embeddings()
    # A matrix further inside is the last part of a head that does more (RoBERTa's, say).
    whole = any(head is child for child in model.children())
    if not whole or any(getattr(model.config, key, None) for key in _RESHAPED_LOGITS):
        full: Tensor = model(input_ids=tokens, use_cache=False).logits
        return full[:, :-1][rows]
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = head(hidden[:, :-1][rows])
    return logits
