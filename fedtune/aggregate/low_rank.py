"""Low-rank algebra: a sum of factor pairs becomes one truncated singular value decomposition.

A sum of low-rank products is `left @ right.T`, where `left` (out, q) and `right` (in, q) hold the
pairs' columns side by side. `recompress` finds its leading singular triplets without forming the
(out, in) product, unless forming it is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from fedtune.records import FloatArray, LoraFactors, LowRank

Route = Literal["factored", "dense"]

STORED_PRECISION = float(np.finfo(np.float32).eps)
"""Directions smaller than this share of the largest are rounding, not content: the state is kept
in float32, so each triplet already carries an error of that size. They are dropped, because a
device would otherwise start from such a direction instead of from a fresh one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Columns whose products add up: `left @ right.T`, left (out, q), right (in, q), float64."""

    left: FloatArray
    right: FloatArray


def empty(out_features: int, in_features: int) -> LowRank:
    """The zero update of rank 0."""
    return LowRank(
        u=np.zeros((out_features, 0), np.float32),
        sigma=np.zeros(0, np.float32),
        v=np.zeros((in_features, 0), np.float32),
    )


def pair_of_factors(factors: LoraFactors, weight: float = 1.0) -> Pair:
    """`weight * scale * b @ a` as columns."""
    left = factors.b.astype(np.float64) * (weight * factors.scale)
    return Pair(left=left, right=factors.a.astype(np.float64).T)


def pair_of_low_rank(low_rank: LowRank, share: float | Float[np.ndarray, "rank"] = 1.0) -> Pair:
    """`u @ diag(share * sigma) @ v.T` as columns; `share` may differ by direction."""
    left = low_rank.u.astype(np.float64) * (low_rank.sigma.astype(np.float64) * share)
    return Pair(left=left, right=low_rank.v.astype(np.float64))


def cheaper_route(out_features: int, in_features: int, columns: int) -> Route:
    """Choose between QR of each side and the dense product, by leading flops.

    With n = min(out, in), M = max(out, in) and q stacked columns:

        factored   4 q^2 (out + in) - 8/3 q^3   Householder QR with Q, both sides
                   + 19 q^3                     product of the triangles, SVD of the core
        dense      2 out in q                   the product
                   + 6 M n^2 + 11 n^3           SVD

    (Golub and Van Loan, Matrix Computations, 4th ed., sections 5.2 and 8.6). For square matrices
    the routes meet at q of about 0.9 n; one core of an EPYC 7003 measured between 0.75 n (64 and
    512 wide) and 0.9 n (1024 wide). Beyond q = n the factors of QR are no longer thin.
    """
    small, large = sorted((out_features, in_features))
    if columns >= small:
        return "dense"
    factored = 4 * columns**2 * (out_features + in_features) + (19 - 8 / 3) * columns**3
    dense = 2 * out_features * in_features * columns + 6 * large * small**2 + 11 * small**3
    return "factored" if factored <= dense else "dense"


def recompress(
    pairs: Sequence[Pair], rank_cap: int, route: Route | None = None
) -> tuple[LowRank, float]:
    """Add pairs up and keep the `rank_cap` directions of most energy.

    Householder QR of each side, then the SVD of the small core, all in float64: stacks that start
    from the same factors are nearly collinear, and a Cholesky factor of their Gram matrix would
    lose half of the digits. The sign of each triplet is fixed by the largest entry of u.

    Args:
        pairs: at least one; together they give the shape.
        rank_cap: most directions to keep.
        route: how to compute; None chooses by `cheaper_route`.

    Returns:
        The update in float32 and the share of the squared norm that the cap cut off, 0..1.
    """
    left = np.concatenate([pair.left for pair in pairs], axis=1)  # (out, q)
    right = np.concatenate([pair.right for pair in pairs], axis=1)  # (in, q)
    alive = left.any(axis=0) & right.any(axis=0)
    left, right = left[:, alive], right[:, alive]
    if route is None:
        route = cheaper_route(left.shape[0], right.shape[0], left.shape[1])
    u, sigma, v = _factored_svd(left, right) if route == "factored" else _dense_svd(left, right)
    return _truncate(u, sigma, v, rank_cap)


def _factored_svd(
    left: Float[np.ndarray, "out q"], right: Float[np.ndarray, "in q"]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    left_basis, left_triangle = np.linalg.qr(left)
    right_basis, right_triangle = np.linalg.qr(right)
    u, sigma, vt = np.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    return left_basis @ u, sigma, right_basis @ vt.T


def _dense_svd(
    left: Float[np.ndarray, "out q"], right: Float[np.ndarray, "in q"]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    u, sigma, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    return u, sigma, vt.T


def _truncate(
    u: Float[np.ndarray, "out q"],
    sigma: Float[np.ndarray, "q"],
    v: Float[np.ndarray, "in q"],
    rank_cap: int,
) -> tuple[LowRank, float]:
    total = float(np.sum(sigma**2))
    if total == 0.0:
        return empty(u.shape[0], v.shape[0]), 0.0
    significant = int(np.count_nonzero(sigma > sigma[0] * STORED_PRECISION))
    rank = min(rank_cap, significant)
    dropped = float(np.sum(sigma[rank:significant] ** 2)) / total
    u, sigma, v = u[:, :rank], sigma[:rank], v[:, :rank]
    largest = np.abs(u).argmax(axis=0)
    sign = np.where(u[largest, np.arange(rank)] < 0, -1.0, 1.0)
    kept = LowRank(
        u=np.ascontiguousarray(u * sign, dtype=np.float32),
        sigma=sigma.astype(np.float32),
        v=np.ascontiguousarray(v * sign, dtype=np.float32),
    )
    return kept, dropped
