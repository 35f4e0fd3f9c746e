"""Leading singular triplets of a sum where the cap cuts, by a randomised block Krylov space.

The sum is only multiplied with a few vectors at a time, so a stack of thousands of columns costs
little more than reading it. What is found is checked twice: by a bound of how much more energy
other directions could hold, and by the energy of the sum, which its factors give exactly.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.singular import Triplets, checked, missing_energy, nothing, on_right_span
from fedtune.aggregate.stack import Sum
from fedtune.records import FloatArray

TOLERANCE = 1e-6
"""Share of the energy by which the kept directions may miss the best ones of the same number."""

STEPS_MAX = 10
"""Blocks of the space; where they are not enough, spectra are so flat that an exact route costs
about as much."""

COARSE = 1e-4
"""Share of the energy left out below which the energy is summed in float64 instead of float32."""

INVARIANT = 1e-5
"""Residuals of all Ritz vectors together, over the sum of the Ritz values, below which the space
holds all of the sum that float32 can tell; the energy then says whether it does."""

OVERSAMPLE = 8
"""Directions beyond the cap that the last products carry."""


def block_size(rank_cap: int) -> int:
    """Vectors that are multiplied at a time: half of the cap, as more steps of fewer vectors reach
    further than fewer steps of more."""
    return (rank_cap + OVERSAMPLE + 1) // 2


def by_krylov(total: Sum, rank_cap: int) -> Triplets | None:
    """The `rank_cap` leading triplets; None if they do not pass the checks.

    The space is that of `(P P^T)^i P omega`, i < steps, for Gaussian omega of a fixed seed, with
    one block of vectors a step, orthogonalised twice against all before. It is built in the dtype
    of the stack; then P is multiplied with the Ritz vectors in float64, three times, so that the
    dtype of the space matters only for which directions are found.

    Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
        singular value decomposition", 2015, https://arxiv.org/abs/1504.05477, algorithm 2; the
        blocks here are smaller than the cap, and the number of steps follows from the check.
    """
    space = _space(total, rank_cap)
    if space is None:
        return None
    if space.shape[1] == 0:
        return nothing(*total.shape)
    back = total.transposed()
    span, _ = np.linalg.qr(back.times(space))
    span, _ = np.linalg.qr(back.times(np.linalg.qr(total.times(span))[0]))
    found = on_right_span(total, span, rank_cap)
    energy, rounding = total.energy(np.float32)
    if missing_energy(found, energy) < COARSE * energy + 100 * rounding:
        energy, rounding = total.energy()
    return checked(found, rank_cap, energy, rounding)


def _space(total: Sum, rank_cap: int) -> Float[np.ndarray, "out k"] | None:
    """Ritz vectors in float64, a few more than the cap; None if they do not pass."""
    back, size = total.transposed(), block_size(rank_cap)
    start = np.random.default_rng(0).standard_normal((total.shape[1], size)).astype(total.dtype)
    block, _ = np.linalg.qr(total.times(start))
    basis = np.empty((total.shape[0], 0), total.dtype)
    images = np.empty((total.shape[1], 0), total.dtype)  # P^T basis
    projected = np.empty((0, 0))  # basis^T P P^T basis
    for _ in range(STEPS_MAX):
        basis = np.concatenate([basis, block], axis=1)
        image = back.times(block)
        images = np.concatenate([images, image], axis=1)
        projected = _bordered(projected, (images.T @ image).astype(np.float64))
        following = total.times(image)
        for _ in range(2):
            following -= basis @ (basis.T @ following)
        block, coupling = np.linalg.qr(following)
        left_over = coupling.astype(np.float64)
        scale = float(np.trace(projected))
        if basis.shape[1] < 2 * rank_cap and np.linalg.norm(left_over) > INVARIANT * scale:
            continue  # it cannot pass yet, and eigenvectors cost as much as products here
        if scale == 0.0:
            return basis[:, :0].astype(np.float64)
        values, vectors = np.linalg.eigh(projected)
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        residuals = np.linalg.norm(left_over @ vectors[-size:], axis=0)
        whole = float(np.linalg.norm(residuals)) <= INVARIANT * scale
        if whole or _excess(values, residuals, rank_cap) <= TOLERANCE * scale:
            kept = vectors[:, : rank_cap + OVERSAMPLE].astype(total.dtype)
            return (basis @ kept).astype(np.float64)
    return None


def _bordered(
    square: Float[np.ndarray, "k k"], columns: Float[np.ndarray, "n l"]
) -> Float[np.ndarray, "n n"]:
    """A symmetric matrix with its last columns and rows added."""
    known = len(square)
    grown = np.empty((len(columns),) * 2)
    grown[:known, :known] = square
    grown[:, known:] = columns
    grown[known:] = columns.T
    return grown


def _excess(values: FloatArray, residuals: FloatArray, rank_cap: int) -> float:
    """A bound of the energy that the best directions hold beyond the `rank_cap` Ritz vectors.

    With the first j >= rank_cap Ritz vectors as one block of `P P^T` and the rest as the other,
    they are coupled by the residuals only, and a coupling c moves an eigenvalue by c^2 over the
    gap to the other block at most (Mathias, 1998, theorem 1). The smallest bound over j counts.
    The next Ritz value stands for the largest eigenvalue of the other block: that none above it
    is missed altogether is what the random start is for.
    """
    coupled = np.cumsum(residuals**2)
    last = np.arange(rank_cap, len(values))
    if len(last) == 0:
        return np.inf
    gaps = values[rank_cap - 1] - values[last]
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.where(gaps > 0, coupled[last - 1] / gaps, np.inf)
    return float(bounds.min())
