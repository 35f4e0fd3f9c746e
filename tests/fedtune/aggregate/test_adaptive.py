"""Row and column squares from factors are those of the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.adaptive import Squares, decayed, over_root, squares_of
from fedtune.aggregate.low_rank import Pair


def pair(seed: int, rank: int) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(rng.standard_normal((12, rank)), rng.standard_normal((9, rank)))


def dense(pair: Pair) -> np.ndarray:
    return np.asarray(pair.left @ pair.right.T)


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_means_of_squares_are_those_of_the_product(rank: int) -> None:
    change = pair(1, rank)
    product = change.left @ change.right.T
    found = squares_of(change)
    np.testing.assert_allclose(found.rows, np.square(product).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.columns, np.square(product).mean(axis=0), rtol=1e-12)


def test_columns_that_cancel_leave_no_negative_squares() -> None:
    one = pair(2, 3)
    twice = Pair(
        np.concatenate([one.left, -one.left], axis=1), np.concatenate([one.right] * 2, axis=1)
    )
    found = squares_of(twice)
    assert (found.rows >= 0).all()
    assert found.rows.max() < 1e-12


def test_squares_decay_and_begin_at_nothing() -> None:
    first, second = squares_of(pair(1, 2)), squares_of(pair(2, 2))
    begun = decayed(None, first, 0.9)
    np.testing.assert_allclose(begun.rows, 0.1 * first.rows)
    found = decayed(begun, second, 0.9)
    np.testing.assert_allclose(found.columns, 0.09 * first.columns + 0.1 * second.columns)


def test_the_division_is_entrywise_by_the_root_of_the_rank_one_squares() -> None:
    mean, tau = pair(1, 2), 0.3
    squares = squares_of(pair(3, 4))
    rows, columns = squares.rows + tau**2, squares.columns + tau**2
    root = np.sqrt(np.outer(rows, columns) / (squares.rows.mean() + tau**2))
    np.testing.assert_allclose(dense(over_root(mean, squares, tau)), dense(mean) / root)


def test_without_squares_the_adaptivity_divides() -> None:
    nothing = Squares(np.zeros(12), np.zeros(9))
    found = dense(over_root(pair(1, 2), nothing, 0.01))
    np.testing.assert_allclose(found, dense(pair(1, 2)) / 0.01)
