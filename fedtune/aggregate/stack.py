"""A sum of low-rank products, either as stacked columns or already multiplied out.

Both forms answer the same questions, so that every route of `singular.py` and `krylov.py` takes
either: products with a few vectors, the Gram matrix of the smaller side, the energy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.side import BLOCK_COLUMNS, BLOCK_ROWS, Side, blocks
from fedtune.records import FloatArray


@dataclass(frozen=True, slots=True)
class Stack:
    """`left @ diag(weights) @ right.T`: left (out, q), right (in, q), weights (q,) in float64."""

    left: Side
    right: Side
    weights: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.length, self.right.length

    @property
    def columns(self) -> int:
        return int(self.weights.shape[0])

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return self.left.dtype

    def transposed(self) -> Stack:
        return Stack(self.right, self.left, self.weights)

    def alive(self) -> Stack:
        """Without columns that add nothing."""
        alive = self.left.alive() & self.right.alive() & (self.weights != 0)
        if alive.all():
            return self
        return Stack(self.left.only(alive), self.right.only(alive), self.weights[alive])

    def times(self, x: Float[np.ndarray, "in l"]) -> Float[np.ndarray, "out l"]:
        """The product with x, in the dtype of x."""
        inner = self.right.transposed_times(x)
        return self.left.times(self.weights.astype(x.dtype)[:, None] * inner)

    def dense(self) -> Float[np.ndarray, "out in"]:
        """The sum multiplied out, in float64."""
        total = np.zeros(self.shape)
        for columns in blocks(self.columns, BLOCK_COLUMNS):
            left = self.left.some(columns, np.float64) * self.weights[columns]
            add_product(total, left, self.right.some(columns, np.float64))
        return total

    def gram(self) -> Float[np.ndarray, "in in"]:
        """`P.T @ P` in float64; P is multiplied out a block of rows at a time."""
        total = np.zeros((self.right.length,) * 2)
        right = self.right.rows(slice(None)).T
        for rows in blocks(self.left.length, BLOCK_ROWS):
            block = (self.left.rows(rows) * self.weights) @ right
            total += block.T @ block
        return total

    def energy(self, dtype: type[np.floating] = np.float64) -> tuple[float, float]:
        """The squared Frobenius norm, and a bound of the rounding in it.

        `||L R^T||^2 = sum of (L^T L) * (R^T R)`, by blocks of columns, or of the product by blocks
        of rows, whichever takes fewer products. Where columns cancel each other, the terms are
        larger than their sum, and so is the rounding.

        Args:
            dtype: of the products; the sums are in float64.
        """
        rows, columns = self.shape
        by_rows = 2 * rows * columns < (rows + columns) * self.columns
        total, size = self._energy_by_rows(dtype) if by_rows else self._energy_by_columns(dtype)
        return max(total, 0.0), 8 * float(np.finfo(dtype).eps) * size

    def _energy_by_columns(self, dtype: type[np.floating]) -> tuple[float, float]:
        total = size = 0.0
        parts = list(blocks(self.columns, BLOCK_COLUMNS))
        for i, first in enumerate(parts):
            left, right = self.left.some(first, dtype).T, self.right.some(first, dtype).T
            for second in parts[i:]:
                once = 1.0 if second is first else 2.0
                terms = (left @ self.left.some(second, dtype)).astype(np.float64)
                terms *= right @ self.right.some(second, dtype)
                terms *= np.outer(self.weights[first], self.weights[second])
                total += once * float(terms.sum())
                size += once * float(np.abs(terms, out=terms).sum())
        return total, size

    def _energy_by_rows(self, dtype: type[np.floating]) -> tuple[float, float]:
        total = 0.0
        right = self.right.some(slice(0, self.columns), dtype).T
        for rows in blocks(self.left.length, BLOCK_ROWS):
            block = (self.left.rows(rows) * self.weights).astype(dtype) @ right
            total += float(np.sum(np.square(block, dtype=np.float64)))
        size = float(np.sum(self.weights**2 * self.left.squares() * self.right.squares()))
        return total, max(total, size)


@dataclass(frozen=True, slots=True)
class Dense:
    """A sum that is multiplied out: value (out, in) in float64."""

    value: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    @property
    def columns(self) -> int:
        return min(self.shape)

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return self.value.dtype

    def transposed(self) -> Dense:
        return Dense(self.value.T)

    def alive(self) -> Dense:
        return self

    def times(self, x: Float[np.ndarray, "in l"]) -> Float[np.ndarray, "out l"]:
        return np.asarray(self.value @ x)

    def dense(self) -> Float[np.ndarray, "out in"]:
        return self.value

    def gram(self) -> Float[np.ndarray, "in in"]:
        return np.asarray(self.value.T @ self.value)

    def energy(self, dtype: type[np.floating] = np.float64) -> tuple[float, float]:
        """As for `Stack`; always of float64."""
        total = float(np.einsum("ij,ij->", self.value, self.value))
        return total, 8 * float(np.finfo(np.float64).eps) * total


Sum: TypeAlias = Stack | Dense


def stack_of(left: FloatArray, right: FloatArray, weights: FloatArray | None = None) -> Stack:
    """`left @ diag(weights) @ right.T` of whole sides; without weights, all are 1."""
    ones = np.ones(left.shape[1])
    return Stack(Side((left,)), Side((right,)), ones if weights is None else weights)


def add_product(
    total: Float[np.ndarray, "out in"],
    left: Float[np.ndarray, "out q"],
    right: Float[np.ndarray, "in q"],
) -> None:
    """Add `left @ right.T` to a matrix in place, by blocks of rows; all in float64."""
    for rows in blocks(total.shape[0], BLOCK_ROWS):
        total[rows] += left[rows] @ right.T
