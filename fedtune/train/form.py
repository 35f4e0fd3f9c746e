"""Micro-batches of like sizes in one static form, so that one recording of a step serves them all.

A CUDA graph reads fixed addresses and has fixed sizes. A form fixes the sizes; a micro-batch that
is smaller is filled up, and neither its losses nor its gradients change by that:

- Tokens are filled up by a sample of padding, behind the others and with positions of its own. No
  sample sees it, and no loss comes from it, so every gradient that passes through it is zero.
- Rows with loss are filled up by rows of weight 0 that all point to the last token of the first
  sample. That token has no successor, so it is never a row of its own, and all that is written to
  its place is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtune.model.attention import Segments
from fedtune.model.loss import Batch, TokenisedSample

_SMALLEST_STEP: Final = 64
"""Tokens. Products work in tiles of 64 to 128 tokens, so smaller steps would save nothing."""
_STEPS: Final = 8
"""Sizes between a power of two and the next: at most 1/8 is filled up, 1/16 in the mean, and the
totals of a run, which are rarely a factor of two apart, need a handful of forms. Powers of two,
to which most people cut their samples, are sizes of a form themselves and are not filled up."""


@dataclass(frozen=True, slots=True)
class Form:
    """The sizes that a recording has.

    Attributes:
        tokens: of all samples, the padding among them.
        segments: samples, and one for the padding if there is any.
        longest: no segment is longer; what the attention is told.
        rows: with loss, those of weight 0 among them.
    """

    tokens: int
    segments: int
    longest: int
    rows: int

    @property
    def words(self) -> int:
        """Numbers of 64 bits that hold a micro-batch's input."""
        return 2 * self.tokens + 2 * self.rows + _half(self.segments + 1) + _half(self.rows) + 1


def form_of(samples: Sequence[TokenisedSample]) -> Form:
    """The smallest form that a micro-batch fits in."""
    lengths = [len(sample.tokens) for sample in samples]
    total = sum(lengths)
    step = max(_SMALLEST_STEP, _power_of_two_below(total) // _STEPS)
    tokens = _up(total, step)
    # The attention is told the next power of two: its cost goes by the true lengths. Less padding
    # than a step makes one segment, which must not be longer than what is told.
    bound = max(*lengths, step)
    longest = min(tokens, 1 << (bound - 1).bit_length())
    loss_rows = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    rows = _up(max(loss_rows, 1), tokens // _STEPS)
    return Form(tokens, len(lengths) + (tokens > total), longest, rows)


def _power_of_two_below(number: int) -> int:
    """The largest that is not above it."""
    return 1 << (number.bit_length() - 1)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _half(numbers: int) -> int:
    """Words of 64 bits that hold so many of 32."""
    return -(-numbers // 2)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A micro-batch's input as parts of one buffer, so that one copy moves it.

    Attributes:
        scale: by which the summed loss is multiplied before the backward pass.
    """

    tokens: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    loss_rows: Int[Tensor, " rows"]
    targets: Int[Tensor, " rows"]
    offsets: Int[Tensor, " bounds"]
    weights: Float[Tensor, " rows"]
    scale: Float[Tensor, ""]

    @classmethod
    def within(cls, buffer: Int[Tensor, " words"], form: Form) -> Inputs:
        """The parts of a buffer of `form.words` int64 numbers."""
        bounds = form.segments + 1
        sizes = [form.tokens, form.tokens, form.rows, form.rows, _half(bounds), _half(form.rows), 1]
        tokens, positions, rows, targets, offsets, weights, scale = torch.split_with_sizes(
            buffer, sizes
        )
        return cls(
            tokens,
            positions,
            rows,
            targets,
            offsets.view(torch.int32)[:bounds],
            weights.view(torch.float32)[: form.rows],
            scale.view(torch.float32)[0],
        )

    def batch(self, lengths: Sequence[int]) -> Batch:
        """What the loss takes.

        Args:
            lengths: of the segments; where one launch serves them all it reads `offsets`, and the
                longest that is possible is enough.
        """
        return Batch(
            tokens=self.tokens[None],
            positions=self.positions[None],
            segments=Segments(tuple(lengths), self.offsets),
            present=None,
            loss_rows=self.loss_rows,
            targets=self.targets,
            labels=self.targets[:0],
            weights=self.weights,
        )


def fill(
    buffer: Int[Tensor, " words"],
    samples: Sequence[TokenisedSample],
    form: Form,
    pad_id: int,
    scale: float,
) -> tuple[int, ...]:
    """Write a micro-batch into a buffer of the host; returns the lengths of its segments.

    Args:
        form: `form_of` these samples, or a larger one with as many segments.
    """
    parts = Inputs.within(buffer, form)
    lengths = [len(sample.tokens) for sample in samples]
    padding = form.tokens - sum(lengths)
    if padding:
        lengths.append(padding)
    offsets = np.cumsum([0, *lengths])
    parts.offsets.numpy()[:] = offsets
    parts.positions.numpy()[:] = np.concatenate([np.arange(length) for length in lengths])
    tokens = parts.tokens.numpy()
    tokens[form.tokens - padding :] = pad_id
    tokens[: form.tokens - padding] = np.concatenate([sample.tokens for sample in samples])
    # The output at position t - 1 predicts token t.
    predicted = [np.flatnonzero(sample.loss_mask[1:]) for sample in samples]
    rows = np.concatenate([own + start for own, start in zip(predicted, offsets, strict=False)])
    loss_rows, targets, weights = (
        part.numpy() for part in (parts.loss_rows, parts.targets, parts.weights)
    )
    loss_rows[: len(rows)], loss_rows[len(rows) :] = rows, lengths[0] - 1
    targets[: len(rows)], targets[len(rows) :] = tokens[rows + 1], 0
    weights[: len(rows)], weights[len(rows) :] = 1.0, 0.0
    parts.scale.fill_(scale)
    return tuple(lengths)
