from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.low_rank import (
    Pair,
    Route,
    empty,
    pair_of_factors,
    pair_of_low_rank,
    recompress,
)
from fedtune.records import LoraFactors


def random_pair(seed: int, out_features: int, in_features: int, columns: int) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(
        rng.standard_normal((out_features, columns)), rng.standard_normal((in_features, columns))
    )


@pytest.mark.parametrize("route", ["factored", "multiplied", "gram"])
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 25), (25, 40), (8, 8), (3, 50)])
@pytest.mark.parametrize("columns", [1, 7, 30])
def test_recompress_is_the_best_approximation(
    route: Route, out_features: int, in_features: int, columns: int
) -> None:
    pairs = [random_pair(s, out_features, in_features, columns) for s in range(2)]
    dense = sum(pair.left @ pair.right.T for pair in pairs)
    u, sigma, vt = np.linalg.svd(dense, full_matrices=False)
    cap = 5
    low_rank, dropped = recompress(pairs, cap, route)
    best = (u[:, :cap] * sigma[:cap]) @ vt[:cap]
    assert np.linalg.norm(low_rank.product() - best) < 1e-6 * np.linalg.norm(best)
    assert dropped == pytest.approx(np.sum(sigma[cap:] ** 2) / np.sum(sigma**2), abs=1e-12)
    identity = np.eye(low_rank.rank)
    assert np.abs(low_rank.u.T @ low_rank.u - identity).max() < 1e-5
    assert np.abs(low_rank.v.T @ low_rank.v - identity).max() < 1e-5


def test_directions_that_are_only_rounding_are_not_kept() -> None:
    pair = random_pair(0, 40, 30, 3)
    noise = random_pair(1, 40, 30, 4)
    low_rank, dropped = recompress([pair, Pair(1e-9 * noise.left, noise.right)], 20)
    assert low_rank.rank == 3
    assert dropped == 0.0


def test_a_sum_that_cancels_is_the_empty_update() -> None:
    factors = LoraFactors(np.ones((2, 5), np.float32), np.ones((6, 2), np.float32), 3.0)
    low_rank, dropped = recompress([pair_of_factors(factors), pair_of_factors(factors, -1.0)], 4)
    assert np.abs(low_rank.product()).max() < 1e-12
    assert dropped == 0.0
    low_rank, _ = recompress([pair_of_low_rank(empty(6, 5))], 4)
    assert low_rank.u.shape == (6, 0)
    assert low_rank.v.shape == (5, 0)


def test_the_sign_of_each_direction_is_fixed() -> None:
    pair = random_pair(2, 20, 20, 4)
    low_rank, _ = recompress([pair], 4)
    flipped, _ = recompress([Pair(-pair.left, -pair.right)], 4)
    assert np.array_equal(low_rank.u, flipped.u)
    assert np.all(low_rank.u[np.abs(low_rank.u).argmax(axis=0), np.arange(4)] > 0)


def test_the_factored_route_keeps_digits_that_a_gram_matrix_would_lose() -> None:
    """Columns that differ by 1e-9 of their size: the difference direction survives."""
    rng = np.random.default_rng(3)
    base, change = rng.standard_normal((50, 1)), rng.standard_normal((50, 1))
    right = rng.standard_normal((40, 1))
    near = Pair(base + 1e-9 * change, right)
    low_rank, _ = recompress([Pair(-base, right), near], 3, "factored")
    expected = 1e-9 * change @ right.T
    assert np.linalg.norm(low_rank.product() - expected) < 1e-5 * np.linalg.norm(expected)
