"""What a group cuts for its devices, and the form in which it returns what they learnt."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.delta import Delta
from fedtune.aggregate.low_rank import empty
from fedtune.errors import ProtocolError
from fedtune.records import (
    DevicePlan,
    Dispatch,
    GlobalAdapter,
    LoraFactors,
    LowRank,
    MatrixPlan,
    MatrixShape,
)
from fedtune_server.hierarchy.group_rule import (
    GroupRule,
    as_factors,
    rank_needed,
    trained_state,
    whole_state,
    within,
)

SHAPE = MatrixShape("q", 12, 10, 0)


def plan(device: str, rank: int, tail_rank: int = 0, steps: int = 2) -> DevicePlan:
    matrix = MatrixPlan("q", rank, "fp32", tail_rank)
    return DevicePlan(device, (matrix,), 1, 1, 8, steps)


def adapter(rank: int) -> GlobalAdapter:
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.normal(size=(12, rank)))
    v, _ = np.linalg.qr(rng.normal(size=(10, rank)))
    sigma = np.arange(rank, 0, -1)
    state = LowRank(u.astype(np.float32), sigma.astype(np.float32), v.astype(np.float32))
    return GlobalAdapter(4, {"q": state})


def sent(rule: Delta | GroupRule, state: GlobalAdapter, device: DevicePlan) -> Dispatch:
    return rule.dispatch(state, device, scale=2.0, rng=np.random.default_rng([7, 5]))


@pytest.mark.parametrize("available", [0, 3, 6])
@pytest.mark.parametrize("group", [plan("g", 3, 4), plan("g", 6), plan("g", 8)], ids=str)
def test_a_device_gets_the_same_bits_through_a_group(available: int, group: DevicePlan) -> None:
    state = adapter(available) if available else GlobalAdapter(4, {"q": empty(12, 10)})
    rule = Delta(rank_cap=6)
    arrived = sent(rule, state, group)
    inside = GroupRule(whole_state(arrived, [SHAPE], 5), group.ranks())
    for device in (plan("a", 2, 3), plan("b", 3, 1)):
        direct = sent(rule, state, device)
        through = sent(inside, trained_state(arrived, 5), device)
        assert through.tail.keys() == direct.tail.keys()
        for one, other in ((direct.trained, through.trained), (direct.tail, through.tail)):
            for name in one:
                np.testing.assert_array_equal(one[name].a, other[name].a)
                np.testing.assert_array_equal(one[name].b, other[name].b)


def test_what_is_returned_has_the_rank_that_was_sent() -> None:
    pair = LoraFactors(np.ones((5, 10), np.float32), np.ones((12, 5), np.float32), 2.0)
    joined = adapter(3).matrices["q"]
    factors = as_factors(joined, pair)
    assert (factors.a.shape, factors.b.shape) == ((5, 10), (12, 5))
    np.testing.assert_allclose(factors.product(), joined.product(), atol=1e-5)


def test_a_device_does_no_more_than_its_group_was_told() -> None:
    cut = within(plan("a", 8, 3, steps=9), plan("g", 4, steps=2))
    assert (cut.ranks(), cut.local_steps) == ({"q": 4}, 2)
    with pytest.raises(ProtocolError, match="a trains no matrix that the group g was sent"):
        within(plan("a", 8), plan("g", 0))


def test_a_group_needs_the_rank_of_what_it_was_sent_and_of_its_devices() -> None:
    assert rank_needed("q", 6, [plan("a", 2), plan("b", 4)]) == 12
    assert rank_needed("k", 6, [plan("a", 2)]) == 6
