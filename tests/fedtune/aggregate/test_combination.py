"""Sums of low-rank matrices agree with the dense sums."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.combination import combine, split
from fedtune.aggregate.low_rank import Pair, empty, recompress
from fedtune.records import LowRank


def low_rank(seed: int, rank: int, shape: tuple[int, int] = (40, 30)) -> LowRank:
    rng = np.random.default_rng(seed)
    pair = Pair(rng.standard_normal((shape[0], rank)), rng.standard_normal((shape[1], rank)))
    return recompress([pair], rank)[0]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("rank", [0, 1, 5, 8, 15])
def test_every_sum_is_the_dense_one_with_orthonormal_directions(rank: int) -> None:
    terms = {"a": low_rank(1, rank), "b": low_rank(2, rank), "c": low_rank(3, 3)}
    for sums in ({"a": 1.0, "b": -2.0, "c": 0.5}, {"c": 3.0}, {"b": 1.0, "a": 0.1}):
        found, dropped = combine(terms, sums, 100)
        expected = sum(weight * terms[name].product() for name, weight in sums.items())
        assert dropped == pytest.approx(0.0, abs=1e-12)
        if not expected.any():
            assert found.rank == 0
            continue
        assert error(found.product(), expected) < 1e-6
        for side in (found.u, found.v):
            np.testing.assert_allclose(side.T @ side, np.eye(found.rank), atol=1e-5)


@pytest.mark.parametrize("rank", [3, 15])
def test_a_cap_keeps_the_leading_directions_and_says_what_it_cuts(rank: int) -> None:
    terms = {"a": low_rank(1, rank), "b": low_rank(2, rank)}
    found, dropped = combine(terms, {"a": 1.0, "b": 1.0}, 4)
    dense = terms["a"].product() + terms["b"].product()
    u, sigma, vt = np.linalg.svd(dense)
    assert error(found.product(), (u[:, :4] * sigma[:4]) @ vt[:4]) < 1e-6
    assert dropped == pytest.approx(1 - np.square(sigma[:4]).sum() / np.square(sigma).sum())


def test_a_term_that_comes_twice_cancels_exactly() -> None:
    same = low_rank(1, 5)
    terms = {"before": same, "joined": same, "momentum": low_rank(2, 2)}
    assert combine(terms, {"joined": 1.0, "before": -1.0}, 10)[0].rank == 0
    assert combine(terms, {"joined": 1.0, "before": -1.0, "momentum": 0.5}, 10)[0].rank == 2


def test_names_without_a_term_add_nothing() -> None:
    terms = {"a": low_rank(1, 5)}
    assert combine(terms, {"b": 2.0}, 10)[0].rank == 0
    found, _ = combine(terms, {"a": 1.0, "b": 2.0}, 10)
    assert error(found.product(), low_rank(1, 5).product()) < 1e-6


def test_a_sum_of_empty_terms_is_empty() -> None:
    found, dropped = combine({"a": empty(40, 30)}, {"a": 1.0}, 3)
    assert (found.u.shape, found.v.shape, dropped) == ((40, 0), (30, 0), 0.0)


@pytest.mark.parametrize("rank", [0, 2, 5, 9])
def test_a_split_parts_leading_directions_from_the_others(rank: int) -> None:
    whole = low_rank(1, 5)
    head, tail = split(whole, rank)
    assert (head.rank, tail.rank) == (min(rank, 5), max(0, 5 - rank))
    np.testing.assert_allclose(head.product() + tail.product(), whole.product(), atol=1e-6)
    np.testing.assert_array_equal(head.sigma, whole.sigma[:rank])
