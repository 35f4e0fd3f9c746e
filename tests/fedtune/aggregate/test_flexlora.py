"""What sets `flexlora` apart: a device votes on every direction, also on those it did not get."""

from __future__ import annotations

import numpy as np

from fedtune.aggregate.flexlora import FlexLora
from fedtune.aggregate.low_rank import Pair, recompress
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    GlobalAdapter,
    MatrixPlan,
)


def state() -> GlobalAdapter:
    rng = np.random.default_rng(0)
    low_rank, _ = recompress([Pair(rng.standard_normal((30, 6)), rng.standard_normal((20, 6)))], 6)
    return GlobalAdapter(1, {"w": low_rank})


def untrained(rule: FlexLora, device: str, rank: int, tail: int) -> Contribution:
    matrices = (MatrixPlan("w", rank, "fp32", tail_rank=tail),)
    sent = rule.dispatch(
        state(),
        DevicePlan(device, matrices, 1, 1, 8, 1),
        scale=1.0,
        rng=np.random.default_rng(0),
    )
    update = AdapterUpdate("run", 1, device, "0", sent.trained, {}, samples=1, tokens=1)
    return Contribution(1.0, sent, update)


def test_directions_that_a_weak_device_did_not_get_shrink_by_its_weight() -> None:
    rule = FlexLora(rank_cap=6)
    joined = rule.join(state(), [untrained(rule, "weak", 2, 0), untrained(rule, "strong", 6, 0)])
    sigma = state().matrices["w"].sigma
    expected = np.sort(np.concatenate([sigma[:2], sigma[2:] / 2]))[::-1]
    assert np.allclose(joined.matrices["w"].sigma, expected, rtol=1e-5)


def test_a_frozen_tail_counts_as_held() -> None:
    rule = FlexLora(rank_cap=6)
    joined = rule.join(state(), [untrained(rule, "weak", 2, 4), untrained(rule, "strong", 6, 0)])
    assert np.allclose(joined.matrices["w"].sigma, state().matrices["w"].sigma, rtol=1e-5)
