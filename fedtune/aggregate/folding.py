"""Products come one after another and are added up in bounded memory, without loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedtune.aggregate.stack import BLOCK_COLUMNS, Dense, Stack, Sum, add_product
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
    """`u @ diag(share * sigma) @ v.T`, without the directions whose share is zero."""
    kept = share != 0
    weights = low_rank.sigma.astype(np.float64) * share
    if kept.all():
        return Columns(low_rank.u, low_rank.v, weights)
    return Columns(low_rank.u[:, kept], low_rank.v[:, kept], weights[kept])


def add_up(parts: Iterable[Columns], shape: tuple[int, int], columns: int) -> Sum:
    """Add parts up in the order in which they come.

    As long as the stacked columns take less memory in float32 than the matrix in float64, they are
    stacked; otherwise they are multiplied out, a block of columns at a time. So a matrix never
    takes more than its full size in float64, however many devices there are. Which of the two it
    is follows from the numbers alone, and the blocks have a fixed size: equal parts in equal order
    give equal bits.

    Args:
        shape: (out, in) of the sum.
        columns: at least as many as all parts have together.
    """
    out_features, in_features = shape
    if 4 * columns * (out_features + in_features) > 8 * out_features * in_features:
        return _multiplied(parts, shape)
    buffer = _Buffer(shape, columns)
    for part in parts:
        rest = buffer.take(part)
        assert rest is None  # `columns` is enough for all
    return buffer.stack()


def _multiplied(parts: Iterable[Columns], shape: tuple[int, int]) -> Dense:
    total = np.zeros(shape)
    buffer = _Buffer(shape, BLOCK_COLUMNS)
    for part in parts:
        rest: Columns | None = part
        while rest is not None:
            rest = buffer.take(rest)
            if buffer.full:
                _flush(total, buffer)
    _flush(total, buffer)
    return Dense(total)


def _flush(total: FloatArray, buffer: _Buffer) -> None:
    stack = buffer.stack()
    add_product(total, stack.left, stack.right, stack.weights)
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

    def stack(self) -> Stack:
        used = slice(0, self.used)
        return Stack(self.left[:, used], self.right[:, used], self.weights[used])
