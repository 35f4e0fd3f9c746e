"""S2FT: A is rows of the identity, stays fixed, and no round leaves the chosen channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.aggregate.delta import Delta
from fedtune.lora.linear import Factors
from fedtune.records import (
    AdapterUpdate,
    ChannelChoice,
    Contribution,
    DevicePlan,
    LoraFactors,
    MatrixPlan,
    MatrixShape,
)
from fedtune.train.sparse import pin_channels

OUT, IN = 12, 30


def fresh_pair(rank: int) -> Factors:
    return Factors(
        torch.randn(rank, IN).requires_grad_(),
        torch.zeros(OUT, rank).requires_grad_(),
        torch.zeros(0, IN),
        torch.zeros(OUT, 0),
        1.0,
    )


def unread(_: str) -> Tensor:
    raise AssertionError("the weights were read")


def pinned(
    pair: Factors, choice: ChannelChoice = "random", seed: int = 0, name: str = "w"
) -> list[int]:
    """The channels of the rows of A."""
    columns = torch.arange(IN, dtype=torch.float32)
    weight = (columns * columns.remainder(7)).expand(OUT, IN)
    inputs = {name: (columns.remainder(11)).expand(5, IN)}
    pin_channels({name: pair}, choice, lambda _: weight, inputs, seed)
    assert torch.equal(pair.a.sum(dim=1), torch.ones(len(pair.a)))
    assert torch.equal(pair.a.max(dim=1).values, torch.ones(len(pair.a)))
    return pair.a.argmax(dim=1).tolist()


def test_rows_of_a_are_distinct_channels_and_only_b_trains() -> None:
    pair = fresh_pair(6)
    assert len(set(pinned(pair))) == 6
    assert not pair.a.requires_grad
    assert pair.b.requires_grad
    assert pair.trains


def test_random_channels_nest_over_ranks_and_differ_by_seed_and_matrix() -> None:
    few, many = pinned(fresh_pair(3)), pinned(fresh_pair(8))
    assert set(few) < set(many)
    assert pinned(fresh_pair(8), seed=1) != many
    assert pinned(fresh_pair(8), name="x") != many


def test_channels_of_largest_weights_or_inputs_are_chosen() -> None:
    # Columns weigh j * (j mod 7), and inputs j mod 11.
    assert sorted(pinned(fresh_pair(3), "weight")) == [20, 26, 27]
    assert sorted(pinned(fresh_pair(2), "activation")) == [10, 21]


def test_frozen_factors_are_left_alone() -> None:
    pair = fresh_pair(2)
    for tensor in (pair.a, pair.b):
        tensor.requires_grad_(False)
    before = pair.a.clone()
    pin_channels({"w": pair}, "weight", unread, {}, 0)
    assert torch.equal(pair.a, before)


def test_a_joined_adapter_of_several_rounds_is_zero_outside_the_channels() -> None:
    """Devices of unequal ranks; in later rounds they are sent mixtures of the channels."""
    rule, shape = Delta(rank_cap=8), MatrixShape("w", OUT, IN, 0)
    adapter = rule.start([shape], {})
    channels: set[int] = set()
    for round in range(3):
        contributions = []
        for device, rank in (("a", 2), ("b", 4)):
            plan = DevicePlan(device, (MatrixPlan("w", rank, "fp32"),), 1, 1, 8, 1)
            sent = rule.dispatch(adapter, plan, scale=0.5, rng=np.random.default_rng(round))
            start = sent.trained["w"]
            pair = Factors(
                torch.tensor(start.a).requires_grad_(),
                torch.tensor(start.b).requires_grad_(),
                torch.zeros(0, IN),
                torch.zeros(OUT, 0),
                0.5,
            )
            pin_channels({"w": pair}, "random", unread, {}, seed=3)
            if round == 0:
                channels |= set(pair.a.argmax(dim=1).tolist())
            moved = pair.b.detach() + torch.randn(pair.b.shape)
            back = LoraFactors(pair.a.numpy(), moved.numpy(), 0.5)
            update = AdapterUpdate("r", round, device, "d", {"w": back}, {}, 1, 1)
            contributions.append(Contribution(1.0, sent, update))
        before, adapter = adapter, rule.join(adapter, contributions)
        expected = before.matrices["w"].product() + sum(
            (c.update.factors["w"].product() - c.sent.trained["w"].product()) / 2
            for c in contributions
        )
        np.testing.assert_allclose(adapter.matrices["w"].product(), expected, atol=1e-5)
    outside = sorted(set(range(IN)) - channels)
    product = adapter.matrices["w"].product()
    assert len(channels) == 4
    assert np.abs(product[:, outside]).max() < 1e-5
    assert np.abs(product[:, sorted(channels)]).max() > 0.1


@pytest.mark.parametrize("held", [1, 2])
def test_fresh_rows_take_the_channels_that_were_not_sent(held: int) -> None:
    first = fresh_pair(4)
    order = pinned(first)
    pair = fresh_pair(4)
    with torch.no_grad():
        pair.a[:held] = torch.nn.functional.one_hot(torch.tensor(order[2 : 2 + held]), IN).float()
        pair.b[:, :held] = 1.0
    assert set(pinned(pair)) == set(order)
