"""The columns of one side of a stack, in one piece or in some, and what is computed from them.

Columns stay in the dtype in which devices sent them. They become float64 in blocks of a fixed
number of rows, so that a side is never held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import lapack

from fedtune.records import FloatArray

BLOCK_ROWS = 1024
"""Rows that become float64 at a time. Larger blocks do not run faster, and take more memory."""

BLOCK_COLUMNS = 256
"""Columns that become float64 at a time: enough for products to run at full speed."""

LAPACK_BLOCK = 32
"""Columns that LAPACK's QR takes at a time; 64 measured no faster, its minimum of work space three
times slower."""


@dataclass(frozen=True, slots=True)
class Side:
    """Columns side by side: pieces (length, q_i) of one dtype. A state is a piece of its own, so
    that its directions need not be copied to those of the devices."""

    pieces: tuple[FloatArray, ...]

    @property
    def length(self) -> int:
        return int(self.pieces[0].shape[0])

    @property
    def columns(self) -> int:
        return sum(piece.shape[1] for piece in self.pieces)

    @property
    def dtype(self) -> np.dtype[np.floating]:
        return self.pieces[0].dtype

    def placed(self) -> Iterator[tuple[slice, FloatArray]]:
        """Each piece, and which columns of the side it is."""
        start = 0
        for piece in self.pieces:
            yield slice(start, start + piece.shape[1]), piece
            start += piece.shape[1]

    def rows(self, rows: slice) -> Float[np.ndarray, "rows q"]:
        """A block of rows in float64."""
        return np.concatenate([piece[rows] for piece in self.pieces], axis=1, dtype=np.float64)

    def some(self, columns: slice, dtype: type[np.floating]) -> Float[np.ndarray, "length k"]:
        """A block of columns in this dtype."""
        found = []
        for place, piece in self.placed():
            start = max(columns.start, place.start) - place.start
            stop = min(columns.stop, place.stop) - place.start
            if start < stop:
                found.append(piece[:, start:stop])
        if len(found) == 1:
            return found[0].astype(dtype, copy=False)
        return np.concatenate(found, axis=1, dtype=dtype)

    def only(self, kept: np.ndarray) -> Side:
        """Without the columns that are marked False."""
        return Side(tuple(piece[:, kept[place]] for place, piece in self.placed()))

    def alive(self) -> np.ndarray:
        """Which columns are not zero."""
        return np.concatenate([piece.any(axis=0) for piece in self.pieces])

    def squares(self) -> Float[np.ndarray, "q"]:
        """Squared norms of the columns, roughly."""
        return np.concatenate([np.einsum("ij,ij->j", p, p) for p in self.pieces]).astype(np.float64)

    def times(
        self, x: Float[np.ndarray, "q l"], into: type[np.floating] | None = None
    ) -> Float[np.ndarray, "length l"]:
        """The product with x, computed in the dtype of x, stored in that or in another."""
        out = np.empty((self.length, x.shape[1]), into or x.dtype)
        if self.dtype == x.dtype == out.dtype:
            out[:] = 0
            for place, piece in self.placed():
                out += piece @ x[place]
            return out
        for rows in blocks(self.length, BLOCK_ROWS):
            out[rows] = self.rows(rows) @ x
        return out

    def transposed_times(self, x: Float[np.ndarray, "length l"]) -> Float[np.ndarray, "q l"]:
        """The product of the transposed side with x, in the dtype of x."""
        if self.dtype == x.dtype:
            return np.concatenate([piece.T @ x for piece in self.pieces])
        out = np.zeros((self.columns, x.shape[1]), x.dtype)
        for rows in blocks(self.length, BLOCK_ROWS):
            out += self.rows(rows).T @ x[rows]
        return out

    def triangle(self, weights: Float[np.ndarray, "q"] | None = None) -> Float[np.ndarray, "k q"]:
        """R of the Householder QR of `side @ diag(weights)`, in float64; k is min(length, q).

        Blocks of rows are put below the triangle of those before them, and factored again, in
        place.
        """
        columns = self.columns
        above = np.empty((0, columns))
        for rows in blocks(self.length, triangle_rows(columns)):
            height = len(above)
            block = np.empty((height + rows.stop - rows.start, columns), order="F")
            block[:height] = above
            for place, piece in self.placed():
                block[height:, place] = piece[rows]
            if weights is not None:
                block[height:] *= weights
            reduced, _, _, failed = lapack.dgeqrf(
                block, lwork=LAPACK_BLOCK * columns, overwrite_a=1
            )
            assert failed == 0  # the shapes are right
            above = np.triu(reduced[:columns])
            del block, reduced
        return above


def triangle_rows(columns: int) -> int:
    """Rows that `triangle` factors at a time: a longer block spends less on the triangle above."""
    return max(BLOCK_ROWS, 2 * columns)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of a fixed size; the last may be shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
