"""A sum of low-rank products, either as stacked columns or already multiplied out.

Both forms answer the same questions, so that every route of `singular.py` and `krylov.py` takes
either: products with a few vectors, the Gram matrix of the smaller side, the energy. Columns stay
in the dtype in which devices sent them; they become float64 in blocks of a fixed number of rows,
so that a stack is never held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from fedtune.records import FloatArray

BLOCK_ROWS = 1024
"""Rows that become float64 at a time. Larger blocks do not run faster, and take more memory."""

BLOCK_COLUMNS = 256
"""Columns that become float64 at a time: enough for products to run at full speed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """`left @ diag(weights) @ right.T`: left (out, q), right (in, q), weights (q,) in float64."""

    left: FloatArray
    right: FloatArray
    weights: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    @property
    def columns(self) -> int:
        return int(self.weights.shape[0])

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return self.left.dtype

    def transposed(self) -> Stack:
        return Stack(self.right, self.left, self.weights)

    def times(self, x: Float[np.ndarray, "in l"]) -> Float[np.ndarray, "out l"]:
        """The product with x, in the dtype of x."""
        inner = transposed_product(self.right, x)
        return product(self.left, self.weights.astype(x.dtype)[:, None] * inner)

    def dense(self) -> Float[np.ndarray, "out in"]:
        """The sum multiplied out, in float64."""
        total = np.zeros(self.shape)
        for columns in _blocks(self.columns, BLOCK_COLUMNS):
            add_product(total, self.left[:, columns], self.right[:, columns], self.weights[columns])
        return total

    def gram(self) -> Float[np.ndarray, "in in"]:
        """`P.T @ P` in float64; P is multiplied out a block of rows at a time."""
        total = np.zeros((self.right.shape[0],) * 2)
        right = self.right.astype(np.float64, copy=False)
        for rows in _blocks(self.left.shape[0], BLOCK_ROWS):
            block = (self.left[rows] * self.weights) @ right.T
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
        blocks = list(_blocks(self.columns, BLOCK_COLUMNS))
        for i, first in enumerate(blocks):
            left = self.left[:, first].astype(dtype, copy=False).T
            right = self.right[:, first].astype(dtype, copy=False).T
            for second in blocks[i:]:
                once = 1.0 if second is first else 2.0
                terms = (left @ self.left[:, second].astype(dtype, copy=False)).astype(np.float64)
                terms *= right @ self.right[:, second].astype(dtype, copy=False)
                terms *= np.outer(self.weights[first], self.weights[second])
                total += once * float(terms.sum())
                size += once * float(np.abs(terms, out=terms).sum())
        return total, size

    def _energy_by_rows(self, dtype: type[np.floating]) -> tuple[float, float]:
        total = 0.0
        right = self.right.astype(dtype, copy=False).T
        for rows in _blocks(self.left.shape[0], BLOCK_ROWS):
            block = ((self.left[rows] * self.weights).astype(dtype) @ right).astype(np.float64)
            total += float(np.einsum("ij,ij->", block, block))
        sides = [np.einsum("ij,ij->j", side, side) for side in (self.left, self.right)]
        return total, max(total, float(np.sum(self.weights**2 * sides[0] * sides[1])))


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


def product(
    tall: Float[np.ndarray, "rows q"], x: Float[np.ndarray, "q l"]
) -> Float[np.ndarray, "rows l"]:
    """`tall @ x` in the dtype of x."""
    if tall.dtype == x.dtype:
        return np.asarray(tall @ x)
    out = np.empty((tall.shape[0], x.shape[1]), x.dtype)
    for rows in _blocks(tall.shape[0], BLOCK_ROWS):
        out[rows] = tall[rows].astype(x.dtype) @ x
    return out


def transposed_product(
    tall: Float[np.ndarray, "rows q"], x: Float[np.ndarray, "rows l"]
) -> Float[np.ndarray, "q l"]:
    """`tall.T @ x` in the dtype of x."""
    if tall.dtype == x.dtype:
        return np.asarray(tall.T @ x)
    out = np.zeros((tall.shape[1], x.shape[1]), x.dtype)
    for rows in _blocks(tall.shape[0], BLOCK_ROWS):
        out += tall[rows].astype(x.dtype).T @ x[rows]
    return out


def add_product(
    total: Float[np.ndarray, "out in"],
    left: Float[np.ndarray, "out q"],
    right: Float[np.ndarray, "in q"],
    weights: Float[np.ndarray, "q"],
) -> None:
    """Add `left @ diag(weights) @ right.T` to a float64 matrix, in place."""
    right_t = right.astype(np.float64).T
    for rows in _blocks(total.shape[0], BLOCK_ROWS):
        total[rows] += (left[rows] * weights) @ right_t


def triangle_rows(columns: int) -> int:
    """Rows that `triangle` factors at a time: a longer block spends less on the triangle above."""
    return max(BLOCK_ROWS, 2 * columns)


def triangle(
    tall: Float[np.ndarray, "rows q"], weights: Float[np.ndarray, "q"] | None = None
) -> Float[np.ndarray, "k q"]:
    """R of the Householder QR of `tall @ diag(weights)`, in float64; k is min(rows, q).

    Blocks of rows are put below the triangle of those before them, and factored again.
    """
    size = triangle_rows(tall.shape[1])
    found: FloatArray | None = None
    for rows in _blocks(tall.shape[0], size):
        block = tall[rows].astype(np.float64)
        if weights is not None:
            block *= weights
        if found is not None:
            block = np.concatenate([found, block])
        found = np.asarray(np.linalg.qr(block, mode="r"))
    assert found is not None  # a matrix has rows
    return found


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
