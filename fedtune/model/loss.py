"""The losses of the two tasks, as sums and counts, computed on rows that carry loss and no others.

Sums and counts, not means: micro-batches then add up to exactly the loss of the whole batch, and
devices add up to exactly the loss of the fleet.

`prepare` makes of samples what the device needs, once, on the host; `loss_sum` then runs without
asking the device for anything, so that a step of fixed shape can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedtune.model.attention import Segments, segments
from fedtune.model.blocks import run_blocks
from fedtune.model.head import Head, frozen_head, head_loss
from fedtune.model.packing import packs, restarting, run_packed
from fedtune.records import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESHAPED_LOGITS = (
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""Config keys of models that change the logits after the output matrix; they take the long way."""
_CAPPED_LOGITS = "final_logit_softcapping"
"""Config key of models that cap the logits (Gemma 2 and later)."""


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
    """Samples on the device: behind one another in one row, or padded on the right.

    Attributes:
        positions: of each token in its sample; None when padded.
        segments: where the samples of the one row lie; None when padded.
        present: which tokens are no padding; None when there is none.
        loss_rows: tokens, counted through all rows, whose successor is predicted with loss.
        targets: those successors.
        labels: class index of each sample, -1 when there is none.
        weights: of each unit of loss (a target, or a sample when classifying); None for one.
    """

    tokens: Int[Tensor, "rows length"]
    positions: Int[Tensor, "rows length"] | None
    segments: Segments | None
    present: Bool[Tensor, "rows length"] | None
    loss_rows: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    labels: Int[Tensor, " samples"]
    weights: Float[Tensor, " units"] | None = None


@dataclass(frozen=True, slots=True)
class LossSum:
    """A sum of losses with its graph, over how many units, and how many were right.

    Attributes:
        units: tokens for causal language modelling, samples for classification.
        hits: units whose target has the highest logit, counted on the device.
    """

    total: Float[Tensor, ""]
    units: int
    hits: Int[Tensor, ""]

    @property
    def correct(self) -> int:
        """`hits`, once the device has them; waits for it."""
        return int(self.hits)


def prepare(
    model: PreTrainedModel,
    samples: Sequence[TokenisedSample],
    pad_id: int,
    task: TaskName,
    weights: Sequence[float] | None = None,
) -> Batch:
    """Samples in the form that suits the model: packed where that is exact, else padded.

    Args:
        weights: factor of each sample's losses, such as 1 / units of the device it belongs to;
            None for one.
    """
    packed = task == "causal-lm" and packs(model)
    return collate(samples, pad_id, model.device, packed=packed, task=task, weights=weights)


def collate(
    samples: Sequence[TokenisedSample],
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
    task: TaskName = "causal-lm",
    weights: Sequence[float] | None = None,
) -> Batch:
    """Lay samples into one row, or pad them on the right, and move them to the device.

    Args:
        packed: only for a model that `packs`.
    """
    lengths = tuple(len(sample.tokens) for sample in samples)
    shape = (1, sum(lengths)) if packed else (len(samples), max(lengths))
    starts = np.cumsum((0, *lengths[:-1])) if packed else np.arange(len(samples)) * shape[1]
    tokens = np.full(shape[0] * shape[1], pad_id, dtype=np.int64)
    present = np.zeros(len(tokens), dtype=np.bool_)
    rows, targets = [], []
    for start, sample in zip(starts, samples, strict=True):
        size = len(sample.tokens)
        tokens[start : start + size] = sample.tokens
        present[start : start + size] = True
        # The output at position t - 1 predicts token t.
        predicted = np.flatnonzero(sample.loss_mask[1:])
        rows.append(predicted + start)
        targets.append(sample.tokens[1:][predicted])
    factors = None
    if weights is not None:
        factors = np.array(weights, dtype=np.float32)
        if task == "causal-lm":
            factors = np.repeat(factors, [len(part) for part in rows])

    def moved(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Batch(
        tokens=moved(tokens.reshape(shape)),
        positions=restarting(lengths).to(device, non_blocking=True) if packed else None,
        segments=segments(lengths, device) if packed else None,
        present=None if packed else moved(present.reshape(shape)),
        loss_rows=moved(np.concatenate(rows).astype(np.int64)),
        targets=moved(np.concatenate(targets).astype(np.int64)),
        labels=moved(np.array([sample.label for sample in samples], dtype=np.int64)),
        weights=None if factors is None else moved(factors),
    )


def loss_units(samples: Sequence[TokenisedSample], task: TaskName) -> int:
    """What `LossSum.units` will be, without computing the loss."""
    if task == "sequence-classification":
        return len(samples)
    return sum(int(sample.loss_mask[1:].sum()) for sample in samples)


def loss_sum(model: PreTrainedModel, batch: Batch, task: TaskName) -> LossSum:
    """Cross-entropy summed over the batch's units, each times its weight.

    For language modelling the output matrix is applied only at positions whose next token carries
    loss. Padding stands on the right, where a causal model cannot see it, so no attention mask is
    needed.
    """
    if task == "sequence-classification":
        assert batch.present is not None
        logits = model(input_ids=batch.tokens, attention_mask=batch.present.long()).logits
        return _plain_loss(logits, batch.labels, batch.weights)
    head = _head_of(model)
    if head is None:
        return _plain_loss(_chosen_logits(model, batch), batch.targets, batch.weights)
    hidden = _hidden(model.base_model, batch)
    found = head_loss(hidden, head, batch.loss_rows, batch.targets, batch.weights)
    return LossSum(found.total, len(batch.targets), found.hits)


def loss_sums(model: PreTrainedModel, batches: Sequence[Batch]) -> list[LossSum]:
    """`loss_sum` of several packed batches, from one pass over all of them.

    Every batch's numbers are those of a pass of its own. Only for a model that `sums_together`.
    """
    head = _head_of(model)
    assert head is not None
    device = batches[0].tokens.device
    lengths = [n for batch in batches if batch.segments for n in batch.segments.lengths]
    whole = replace(
        batches[0],
        tokens=torch.cat([batch.tokens for batch in batches], dim=1),
        positions=restarting(tuple(lengths)).to(device, non_blocking=True),
        segments=segments(lengths, device),
    )
    hidden = _hidden(model.base_model, whole)
    sizes = [batch.tokens.shape[1] for batch in batches]
    sums = []
    for batch, own in zip(batches, torch.split_with_sizes(hidden, sizes), strict=True):
        found = head_loss(own, head, batch.loss_rows, batch.targets, batch.weights)
        sums.append(LossSum(found.total, len(batch.targets), found.hits))
    return sums


def sums_together(model: PreTrainedModel) -> bool:
    """Whether `loss_sums` can take the model; hold its lock."""
    return _head_of(model) is not None and packs(model)


def _head_of(model: PreTrainedModel) -> Head | None:
    """The frozen output matrix, when nothing stands between it and the loss but a soft cap."""
    if not _whole_head(model):
        return None
    return frozen_head(
        model.get_output_embeddings(), getattr(model.config, _CAPPED_LOGITS, None) or None
    )


def _whole_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    # A matrix further inside is the last part of a head that does more (RoBERTa's, say).
    whole = any(head is child for child in model.children())
    return whole and not any(getattr(model.config, key, None) for key in _RESHAPED_LOGITS)


def _chosen_logits(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "targets vocabulary"]:
    """The logits that carry loss, over autograd, from whatever head the model has."""
    capped = getattr(model.config, _CAPPED_LOGITS, None)
    if capped or not _whole_head(model):
        full: Tensor = _run(model, batch).logits
        return full.flatten(0, 1).index_select(0, batch.loss_rows)
    hidden = _hidden(model.base_model, batch)
    head = model.get_output_embeddings()
    logits: Tensor = head(hidden.index_select(0, batch.loss_rows))
    return logits


def _hidden(body: PreTrainedModel, batch: Batch) -> Float[Tensor, "tokens hidden"]:
    """The last hidden states of all rows, padding among them."""
    found: Tensor | None = None
    if batch.segments is not None and batch.positions is not None:
        found = run_blocks(body, batch.tokens, batch.positions, batch.segments)
    if found is None:
        found = _run(body, batch).last_hidden_state
    return found.flatten(0, 1)


def _run(body: PreTrainedModel, batch: Batch) -> Any:  # the models' output classes are untyped
    if batch.segments is None or batch.positions is None:
        return body(input_ids=batch.tokens, use_cache=False)
    return run_packed(body, batch.tokens, batch.positions, batch.segments)


def _plain_loss(
    logits: Float[Tensor, "units classes"],
    targets: Int[Tensor, " units"],
    weights: Float[Tensor, " units"] | None,
) -> LossSum:
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    total = losses.sum() if weights is None else losses @ weights
    hits = (logits.detach().argmax(-1) == targets).sum()
    return LossSum(total, int(targets.numel()), hits)
