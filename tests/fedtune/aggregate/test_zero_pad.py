"""What sets `zero-pad` apart: rows of A and columns of B are averaged one by one."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.zero_pad import ZeroPad
from fedtune.errors import PlanError
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    GlobalAdapter,
    LoraFactors,
    MatrixPlan,
    MatrixShape,
)

SHAPE = MatrixShape("w", 12, 10, 0)
RULE = ZeroPad(rank_cap=6, seed=1)


def plan(rank: int) -> DevicePlan:
    return DevicePlan("d", (MatrixPlan("w", rank, "fp32"),), 1, 1, 8, 1)


def returned(state: GlobalAdapter, device: str, rank: int, value: float) -> Contribution:
    sent = RULE.dispatch(state, plan(rank), scale=2.0, rng=np.random.default_rng(0))
    a, b = np.full((rank, 10), value, np.float32), np.full((12, rank), value, np.float32)
    factors = {"w": LoraFactors(a, b, 2.0)}
    update = AdapterUpdate("run", 1, device, "0", factors, {}, samples=1, tokens=1)
    return Contribution(1.0, sent, update)


def test_missing_rows_count_as_zeros_up_to_the_largest_rank() -> None:
    start = RULE.start([SHAPE], {})
    joined = RULE.join(start, [returned(start, "a", 2, 1.0), returned(start, "b", 4, 3.0)])
    state = joined.matrices["w"]
    assert np.array_equal(state.v[0], np.float32([2, 2, 1.5, 1.5, *start.matrices["w"].v[0, 4:]]))
    assert np.array_equal(state.u[0], np.float32([4, 4, 3, 3, 0, 0]))
    assert np.array_equal(state.sigma, np.ones(6))


def test_directions_above_the_largest_rank_keep_their_random_start() -> None:
    start = RULE.start([SHAPE], {})
    joined = RULE.join(start, [returned(start, "a", 2, 1.0)])
    assert np.array_equal(joined.matrices["w"].v[:, 2:], start.matrices["w"].v[:, 2:])
    assert start.matrices["w"].v.std() == pytest.approx(10**-0.5, rel=0.3)


def test_trained_directions_that_nobody_trains_now_stay() -> None:
    start = RULE.start([SHAPE], {})
    first = RULE.join(start, [returned(start, "a", 4, 1.0)])
    second = RULE.join(first, [returned(first, "a", 2, 5.0)])
    assert np.array_equal(second.matrices["w"].u[0], np.float32([10, 10, 2, 2, 0, 0]))


def test_a_rank_above_the_cap_is_an_error() -> None:
    start = RULE.start([SHAPE], {})
    with pytest.raises(PlanError, match="must be at most 6 under the rule zero-pad, got 7"):
        RULE.dispatch(start, plan(7), scale=1.0, rng=np.random.default_rng(0))
