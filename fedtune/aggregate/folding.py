"""Products come one after another and are added up in bounded memory, without loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from fedtune.aggregate.side import BLOCK_COLUMNS, Side
from fedtune.aggregate.stack import Dense, Stack, Sum, add_product
from fedtune.records import FloatArray, LoraFactors, LowRank


@dataclass(frozen=True, slots=True)
class Columns:
    """`left @ diag(weights) @ right.T` of one device or state, in the dtype it came in."""

    left: FloatArray
    right: FloatArray
    weights: FloatArray


def columns_of_factors(factors: LoraFactors, weight: float) -> Columns:
    """`weight * scale * b @ a`."""
    return Columns(factors.b, factors.a.T, np.full(factors.rank, weight * factors.scale))


def columns_of_low_rank(low_rank: LowRank, share: FloatArray) -> Columns:
    """`u @ diag(share * sigma) @ v.T`, without the leading directions whose share is zero."""
    weights = low_rank.sigma.astype(np.float64) * share
    first = int(np.argmax(share != 0)) if share.any() else len(share)  # later zeros are rare
    return Columns(low_rank.u[:, first:], low_rank.v[:, first:], weights[first:])


def add_up(state: Columns, parts: Iterable[Columns], columns: int) -> Sum:
    """Add parts to a state in the order in which they come.

    As long as the stacked columns take less memory in float32 than the matrix in float64, they are
    stacked; otherwise they are multiplied out, a block of columns at a time. So a matrix never
    takes more than its full size in float64, however many devices there are. Which of the two it
    is follows from the numbers alone, and the blocks have a fixed size: equal parts in equal order
    give equal bits.

    Args:
        state: is not copied; it gives the shape, and may have no column.
        columns: at least as many as all parts have together.
    """
    shape = out_features, in_features = state.left.shape[0], state.right.shape[0]
    if 4 * columns * (out_features + in_features) > 8 * out_features * in_features:
        return _multiplied(state, parts, shape)
    buffer = _Buffer(shape, columns)
    for part in parts:
        rest = buffer.take(part)
        assert rest is None  # `columns` is enough for all
    added = buffer.columns()
    if not len(state.weights):
        return Stack(Side((added.left,)), Side((added.right,)), added.weights)
    return Stack(
        Side((state.left, added.left)),
        Side((state.right, added.right)),
        np.concatenate([state.weights, added.weights]),
    )


def _multiplied(state: Columns, parts: Iterable[Columns], shape: tuple[int, int]) -> Dense:
    total = np.zeros(shape)
    buffer = _Buffer(shape, BLOCK_COLUMNS)
    for part in chain([state], parts):
        rest: Columns | None = part
        while rest is not None:
            rest = buffer.take(rest)
            if buffer.full:
                _flush(total, buffer)
    _flush(total, buffer)
    return Dense(total)


def _flush(total: FloatArray, buffer: _Buffer) -> None:
    added = buffer.columns()
    add_product(total, added.left * added.weights, added.right.astype(np.float64))
    buffer.used = 0


class _Buffer:
    """Float32 columns, filled from the left."""

    def __init__(self, shape: tuple[int, int], columns: int) -> None:
        self.left = np.empty((shape[0], columns), np.float32)
        self.right = np.empty((shape[1], columns), np.float32)
        self.weights = np.empty(columns)
        self.used = 0

    @property
    def full(self) -> bool:
        return self.used == len(self.weights)

    def take(self, part: Columns) -> Columns | None:
        """Copy what there is room for; the rest comes back."""
        taken = min(len(part.weights), len(self.weights) - self.used)
        target = slice(self.used, self.used + taken)
        self.left[:, target] = part.left[:, :taken]
        self.right[:, target] = part.right[:, :taken]
        self.weights[target] = part.weights[:taken]
        self.used += taken
        if taken == len(part.weights):
            return None
        return Columns(part.left[:, taken:], part.right[:, taken:], part.weights[taken:])

    def columns(self) -> Columns:
        used = slice(0, self.used)
        return Columns(self.left[:, used], self.right[:, used], self.weights[used])
