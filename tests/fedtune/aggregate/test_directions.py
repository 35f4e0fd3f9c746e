from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fedtune.aggregate.directions import (
    Directions,
    all_fresh,
    choose_directions,
    dispatch_directions,
    split_triplets,
)
from fedtune.aggregate.low_rank import Pair, recompress
from fedtune.records import DevicePlan, Dispatch, GlobalAdapter, LoraScale, MatrixPlan, Scale


def matrix(rank: int, tail: int = 0) -> MatrixPlan:
    return MatrixPlan("w", rank, "fp32", tail_rank=tail)


@pytest.mark.parametrize(
    ("available", "plan", "fresh_rank", "expected"),
    [
        (10, matrix(4), 0, Directions(4, 0, 0)),
        (10, matrix(4, tail=3), 0, Directions(4, 0, 3)),
        (5, matrix(4, tail=3), 0, Directions(4, 0, 1)),
        (2, matrix(4, tail=3), 0, Directions(2, 2, 0)),
        (0, matrix(4, tail=3), 0, Directions(0, 4, 0)),
        (10, matrix(4, tail=9), 1, Directions(3, 1, 7)),
        (10, matrix(4, tail=99), 9, Directions(0, 4, 10)),
        (10, matrix(0, tail=3), 0, Directions(0, 0, 3)),
    ],
)
def test_directions_split_into_warm_fresh_and_tail(
    available: int, plan: MatrixPlan, fresh_rank: int, expected: Directions
) -> None:
    assert choose_directions(available, plan, fresh_rank) == expected


def test_all_fresh_freezes_the_whole_adapter() -> None:
    assert all_fresh(10, matrix(4)) == Directions(0, 4, 10)


def adapter(rank: int = 6) -> GlobalAdapter:
    rng = np.random.default_rng(0)
    low_rank, _ = recompress(
        [Pair(rng.standard_normal((30, rank)), rng.standard_normal((400, rank)))], rank
    )
    return GlobalAdapter(1, {"w": low_rank, "x": low_rank})


def dispatch(plan: DevicePlan, seed: int = 0, scale: Scale = 0.5) -> Dispatch:
    return dispatch_directions(
        adapter(),
        plan,
        partial(choose_directions, fresh_rank=0),
        scale=scale,
        rng=np.random.default_rng(seed),
    )


def device(*matrices: MatrixPlan) -> DevicePlan:
    return DevicePlan("d", matrices, 1, 1, 8, 1)


def test_the_product_is_the_triplets_and_rows_of_a_have_norm_one() -> None:
    low_rank = adapter().matrices["w"]
    factors = split_triplets(low_rank, 1, 4, scale=0.5)
    expected = (low_rank.u[:, 1:4] * low_rank.sigma[1:4]) @ low_rank.v[:, 1:4].T
    assert np.abs(factors.product() - expected).max() < 1e-5
    assert np.linalg.norm(factors.a, axis=1) == pytest.approx(1.0, rel=1e-5)


def test_fresh_rows_are_nested_over_devices_of_other_ranks() -> None:
    """The rank of the matrix before must not shift what the next one draws."""
    low = dispatch(device(matrix(7), replace(matrix(8), name="x")))
    high = dispatch(device(matrix(20), replace(matrix(12), name="x")))
    for name in ("w", "x"):
        rank = low.trained[name].rank
        assert np.array_equal(low.trained[name].a, high.trained[name].a[:rank])
    assert not np.array_equal(high.trained["w"].a[6:12], high.trained["x"].a[6:12])


def test_fresh_rows_have_the_deviation_of_one_over_the_root_of_the_input() -> None:
    sent = dispatch(device(matrix(30)))
    rows = sent.trained["w"].a[6:]
    assert rows.std() == pytest.approx(400**-0.5, rel=0.05)
    assert not sent.trained["w"].b[:, 6:].any()


def test_another_seed_draws_other_rows() -> None:
    first, second = (dispatch(device(matrix(8)), seed).trained["w"].a for seed in (0, 1))
    assert np.array_equal(first[:6], second[:6])
    assert not np.array_equal(first[6:], second[6:])


def test_a_frozen_matrix_can_still_have_a_tail() -> None:
    sent = dispatch(device(matrix(0, tail=2)))
    assert sent.trained == {}
    assert sent.tail["w"].rank == 2


def test_a_stabilised_scale_goes_by_the_trained_rank_and_leaves_the_product() -> None:
    plan = device(matrix(4, tail=2), replace(matrix(0, tail=3), name="x"))
    plain, stabilised = dispatch(plan), dispatch(plan, scale=LoraScale(0.5, "rank-stabilised"))
    assert stabilised.trained["w"].scale == stabilised.tail["w"].scale == 0.25
    assert stabilised.tail["x"].scale == 0.5
    for name in ("trained", "tail"):
        for key, pair in getattr(plain, name).items():
            other = getattr(stabilised, name)[key]
            assert np.abs(pair.product() - other.product()).max() < 1e-5
