"""Leading singular triplets of a sum of products: the routes that are exact in float64.

Each route takes the sum and the cap, and returns at most `rank_cap` triplets with the share of the
energy that is left out. Directions below the precision in which the state is stored are rounding,
and count as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.side import BLOCK_ROWS, Side, blocks
from fedtune.aggregate.stack import Dense, Stack, Sum
from fedtune.records import FloatArray

STORED_PRECISION = float(np.finfo(np.float32).eps)
"""Directions smaller than this share of the largest are rounding, not content: the state is kept
in float32, so each triplet already carries an error of that size. They are dropped, because a
device would otherwise start from such a direction instead of from a fresh one."""

ORTHONORMAL = 5e-7
"""Largest entry of `u.T @ u - 1` that passes: some times the rounding of float32."""

EXACT_ENERGY = 1e-14
"""Share of the energy that may be missing from a sum of which nothing is cut: 1e-7 of the norm."""

MULTIPLIED_VALUES = 2**22
"""A matrix of so many values (32 MiB) is multiplied out at once; a larger one by blocks, twice."""

TOO_ROUNDED = 1e-3
"""Share of the energy that may be rounding before nothing can be said of what is missing."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """`u @ diag(sigma) @ v.T`: u (out, R), sigma (R,) falling, in float64, v (in, R).

    Attributes:
        dropped: share of the squared norm that the cap cut off, 0..1.
    """

    u: FloatArray
    sigma: FloatArray
    v: FloatArray
    dropped: float

    def transposed(self) -> Triplets:
        return Triplets(self.v, self.sigma, self.u, self.dropped)


def factored(stack: Stack, rank_cap: int, dtype: type[np.floating] = np.float64) -> Triplets:
    """QR of each side without its orthonormal factor, SVD of the small core.

    With `L = Q S` and `R = Z T`, the core is `S T^T = A diag(sigma) B^T`. The singular vectors
    follow from the stack itself: `u = L T^T B / sigma` and `v = R S^T A / sigma`, so neither Q
    nor Z is formed or kept. A division by a small sigma magnifies rounding; where columns cancel
    each other so far that u or v is not orthonormal any more, Q and Z are formed after all.
    Householder QR, because stacks that start from the same factors are nearly collinear, and a
    Cholesky factor of their Gram matrix would lose half of the digits.

    Args:
        dtype: of u and v, which are computed in float64.
    """
    left, right = stack.left.triangle(stack.weights), stack.right.triangle()
    a, sigma, bt = np.linalg.svd(left @ right.T, full_matrices=False)
    rank, dropped = kept_rank(sigma, rank_cap)
    sigma = sigma[:rank]
    along = stack.weights[:, None] * (right.T @ (bt[:rank].T / sigma))
    across = left.T @ (a[:, :rank] / sigma)
    del left, right, a, bt
    u, v = stack.left.times(along, dtype), stack.right.times(across, dtype)
    if max(skewness(u), skewness(v)) > ORTHONORMAL:
        return _by_orthonormal_factors(stack, rank_cap)
    return Triplets(u, sigma, v, dropped)


def _by_orthonormal_factors(stack: Stack, rank_cap: int) -> Triplets:
    whole = slice(None)
    left_basis, left = np.linalg.qr(stack.left.rows(whole) * stack.weights)
    right_basis, right = np.linalg.qr(stack.right.rows(whole))
    u, sigma, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    rank, dropped = kept_rank(sigma, rank_cap)
    return Triplets(left_basis @ u[:, :rank], sigma[:rank], right_basis @ vt[:rank].T, dropped)


def multiplied(total: Sum, rank_cap: int) -> Triplets:
    """SVD of the whole matrix."""
    u, sigma, vt = np.linalg.svd(total.dense(), full_matrices=False)
    rank, dropped = kept_rank(sigma, rank_cap)
    return Triplets(u[:, :rank], sigma[:rank], vt[:rank].T, dropped)


def by_gram(total: Sum, rank_cap: int) -> Triplets | None:
    """Eigenvectors of the Gram matrix of the smaller side, then SVD of the sum on their span.

    An eigenvalue has the rounding of the largest one, which is half of the digits of a small
    sigma; so eigenvectors only choose the span, and the sum itself is multiplied with it. What
    the span misses is known from the trace. None if the cap cuts nothing and yet something is
    missing.
    """
    if total.shape[0] < total.shape[1]:
        found = by_gram(total.transposed(), rank_cap)
        return None if found is None else found.transposed()
    if total.shape[0] * total.shape[1] <= MULTIPLIED_VALUES:
        total = Dense(total.dense())
    gram = total.gram()
    energy = float(np.trace(gram))
    if energy == 0.0:
        return nothing(*total.shape)
    values, vectors = np.linalg.eigh(gram)
    held = int(np.count_nonzero(values > values[-1] * float(np.finfo(np.float64).eps)))
    span = np.ascontiguousarray(vectors[:, ::-1][:, : min(rank_cap, held)])
    found = on_right_span(total, span, rank_cap)
    return checked(found, rank_cap, energy, 8 * float(np.finfo(np.float64).eps) * energy)


def on_right_span(total: Sum, span: Float[np.ndarray, "in k"], rank_cap: int) -> Triplets:
    """Triplets of the sum times the projector on a span with orthonormal columns.

    What they drop is that of the projected sum; `checked` puts the whole sum in.
    """
    basis, small = np.linalg.qr(total.times(span))
    inner, sigma, outer = np.linalg.svd(small)
    rank, dropped = kept_rank(sigma, rank_cap)
    return Triplets(basis @ inner[:, :rank], sigma[:rank], span @ outer[:rank].T, dropped)


def missing_energy(found: Triplets, energy: float) -> float:
    """What the triplets do not hold of a sum of this squared norm."""
    return max(energy - float(np.sum(found.sigma**2)), 0.0)


def checked(found: Triplets, rank_cap: int, energy: float, rounding: float) -> Triplets | None:
    """The triplets with the share of the whole sum that they drop.

    Args:
        energy: squared norm of the whole sum.
        rounding: how far that may be wrong.

    Returns:
        None if the cap cuts nothing and something is missing all the same, or if so much cancels
        in the sum that what is missing cannot be told.
    """
    if energy == rounding == 0.0:
        return nothing(found.u.shape[0], found.v.shape[0])
    if rounding > TOO_ROUNDED * energy:
        return None
    missing = missing_energy(found, energy)
    exact = missing <= max(EXACT_ENERGY * energy, rounding)
    if len(found.sigma) < rank_cap and not (exact and rounding <= 100 * EXACT_ENERGY * energy):
        return None
    return replace(found, dropped=0.0 if exact else missing / energy)


def kept_rank(sigma: Float[np.ndarray, "q"], rank_cap: int) -> tuple[int, float]:
    """How many directions stay, and the share of the energy that the cap cuts off."""
    total = float(np.sum(sigma**2))
    if total == 0.0:
        return 0, 0.0
    significant = int(np.count_nonzero(sigma > sigma[0] * STORED_PRECISION))
    rank = min(rank_cap, significant)
    return rank, float(np.sum(sigma[rank:significant] ** 2)) / total


def nothing(out_features: int, in_features: int) -> Triplets:
    """No direction at all."""
    return Triplets(np.zeros((out_features, 0)), np.zeros(0), np.zeros((in_features, 0)), 0.0)


def skewness(basis: Float[np.ndarray, "length k"]) -> float:
    """Largest entry of `basis.T @ basis - 1`, computed in float64."""
    if basis.shape[1] == 0:
        return 0.0
    side = Side((basis,))
    gram = np.zeros((basis.shape[1],) * 2)
    for rows in blocks(side.length, BLOCK_ROWS):
        block = side.rows(rows)
        gram += block.T @ block
    return float(np.abs(gram - np.eye(len(gram))).max())
