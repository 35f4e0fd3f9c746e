"""Second moments of a low-rank change by row and by column, and the step that they scale.

FedAdam divides each entry of the mean change by the root of the running mean of its own squares. An
(out, in) matrix of squares has full rank: it cannot be held in factored form, and a division by it
would leave the low-rank changes full-rank too. Here the squares are kept as Adafactor keeps them,
as their means over each row and each column, and their product stands for the matrix:

    r <- beta2 r + (1 - beta2) mean_j Delta_ij^2          c <- the same over i
    V_ij = (r_i + tau^2) (c_j + tau^2) / (mean(r) + tau^2)

Both means are exact from the factors: row i of Delta = L R^T has the squared norm
L_i (R^T R) L_i^T. And 1 / sqrt(V) is of rank one, so M / sqrt(V) is M with its rows and columns
rescaled, which keeps the rank of M. What differs from FedAdam:

- squares that are no product of a row and a column part are smoothed to one. For given row and
  column sums it is the matrix of least I-divergence from the squares (Shazeer and Stern, section
  3);
- tau is inside the root, in rows and columns alike, because sqrt(V) + tau is not of rank one;
- both moments are divided by 1 - beta^t, as Adam does. FedAdam starts its squares at tau^2 and its
  mean at zero, and with beta1 0.9 and beta2 0.99 a steady change is then overstepped twofold in the
  first tens of rounds, which are all that a federated run has.

Sources: Reddi et al., "Adaptive federated optimization", ICLR 2021,
https://arxiv.org/abs/2003.00295, algorithm 2 (FedAdam); Shazeer and Stern, "Adafactor", ICML 2018,
https://arxiv.org/abs/1804.04235, algorithm 4, whose epsilon_1 is tau^2; its clipping and relative
step sizes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.low_rank import Pair
from fedtune.records import FloatArray


@dataclass(frozen=True, slots=True)
class Squares:
    """Running means of the squares of one matrix's changes, in float64.

    Attributes:
        rows: mean over each row (out,).
        columns: mean over each column (in,).
    """

    rows: FloatArray
    columns: FloatArray


def squares_of(change: Pair) -> Squares:
    """Row and column means of the squares of `left @ right.T`, without forming it."""
    left, right = change.left, change.right
    rows = np.einsum("iq,iq->i", left @ (right.T @ right), left)
    columns = np.einsum("jq,jq->j", right @ (left.T @ left), right)
    # A row that is zero may come out as minus a rounding error.
    return Squares(
        rows=np.maximum(rows, 0.0) / right.shape[0],
        columns=np.maximum(columns, 0.0) / left.shape[0],
    )


def decayed(before: Squares | None, change: Squares, beta: float) -> Squares:
    """`beta * before + (1 - beta) * change`; before the first round there is nothing."""
    if before is None:
        return Squares((1.0 - beta) * change.rows, (1.0 - beta) * change.columns)
    return Squares(
        rows=beta * before.rows + (1.0 - beta) * change.rows,
        columns=beta * before.columns + (1.0 - beta) * change.columns,
    )


def over_root(mean: Pair, squares: Squares, adaptivity: float) -> Pair:
    """M / sqrt(V) as columns: those of M with their rows and columns rescaled.

    Args:
        squares: already divided by 1 - beta2^t.
        adaptivity: tau, positive, in the unit of a change.
    """
    by_row, by_column = _scales(squares, adaptivity)
    return Pair(mean.left * by_row[:, None], mean.right * by_column[:, None])


def _scales(
    squares: Squares, adaptivity: float
) -> tuple[Float[np.ndarray, "out"], Float[np.ndarray, "in"]]:
    """Their outer product is 1 / sqrt(V)."""
    floor = adaptivity**2
    share = (float(np.mean(squares.rows)) + floor) ** 0.25
    return share / np.sqrt(squares.rows + floor), share / np.sqrt(squares.columns + floor)
