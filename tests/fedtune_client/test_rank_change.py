"""A device whose rank changes between rounds goes on from what was learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.aggregate.rules import make_rule
from fedtune.model.shapes import read_shapes
from fedtune.records import (
    Contribution,
    DevicePlan,
    Dispatch,
    GlobalAdapter,
    LoraFactors,
    LoraScale,
    MatrixPlan,
)
from fedtune.wire.check import check_update
from fedtune.wire.messages import OptimizerSpec
from fedtune.wire.packing import pack_tensors
from fedtune.wire.tensors import dispatch_tensors

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages
CAP = 16
SCALE = LoraScale(2.0)
RANKS = (8, 8, 4, 4, 8, 8)


class Alone:
    """Rounds of one device, joined by `delta` as a coordinator does it."""

    def __init__(self, desk: Desk, tail: bool) -> None:
        self.desk, self.tail = desk, tail
        self.agent = desk.agent()
        self.matrices = read_shapes(desk.folder, ("all-linear",)).matrices
        self.rule = make_rule("delta", CAP)
        self.adapter: GlobalAdapter = self.rule.start(self.matrices, {})
        self.last: tuple[Dispatch, Mapping[str, LoraFactors]]

    def plan(self, rank: int) -> DevicePlan:
        plan: DevicePlan = self.desk.plan("east", local_steps=4)
        tail = CAP - rank if self.tail else 0
        return replace(
            plan,
            matrices=tuple(
                MatrixPlan(m.name, min(rank, m.out_features, m.in_features), "fp32", tail_rank=tail)
                for m in self.matrices
            ),
        )

    def sent(self, rank: int, round: int) -> Dispatch:
        rng = np.random.default_rng([0, round])
        return self.rule.dispatch(self.adapter, self.plan(rank), scale=SCALE, rng=rng)

    def held_out_loss(self, rank: int) -> float:
        """Of the adapter as it is, as a device of that rank computes it."""
        plan = self.plan(rank)
        packed = pack_tensors(dispatch_tensors(self.sent(rank, 99)), "fp32")
        order = replace(self.desk.evaluation(plan, packed), scale=SCALE)
        return float(self.agent.evaluate(order, packed).metrics["held_out_loss"])

    def play(self, rank: int, round: int) -> float:
        """One round; returns the held-out loss that the device starts it with."""
        plan, sent = self.plan(rank), self.sent(rank, round)
        packed = pack_tensors(dispatch_tensors(sent), "fp32")
        optimizer = OptimizerSpec(learning_rate=0.02, final_learning_rate=0.02, keep=True)
        order = self.desk.order(plan, packed, round, optimizer=optimizer, scale=SCALE)
        report, tensors = self.agent.train(order, packed)
        update = check_update(
            report,
            tensors,
            run="run-1",
            round=round,
            device="east",
            base_digest=order.base_digest,
            plan=plan,
            shapes={m.name: m for m in self.matrices},
            dense_shapes={},
            max_norm=1e4,
            scale=SCALE,
        )
        self.last = sent, update.factors
        self.adapter = self.rule.join(self.adapter, [Contribution(1.0, sent, update)])
        return float(report.metrics["held_out_loss"])


@pytest.fixture(params=[True, False], ids=["tail", "no tail"])
def alone(request: pytest.FixtureRequest, desk: Desk) -> Alone:
    return Alone(desk, request.param)


def test_a_switch_of_rank_sends_the_joined_adapter_as_it_is(alone: Alone) -> None:
    for round, rank in enumerate(RANKS, start=1):
        before = alone.adapter
        sent = alone.sent(rank, round)
        for name, state in before.matrices.items():
            warm = sent.trained[name].product()
            tail = sent.tail[name].product() if name in sent.tail else 0.0
            # What a device is not sent, which is nothing where a tail is: the smallest triplets.
            kept = CAP if alone.tail else rank
            missing = np.linalg.norm(state.sigma[kept:]) if state.rank > kept else 0.0
            error = np.linalg.norm(warm + tail - state.product())
            assert error == pytest.approx(missing, abs=1e-5)
        alone.play(rank, round)


def test_held_out_loss_goes_on_from_where_it_was(desk: Desk) -> None:
    alone = Alone(desk, tail=True)
    losses = []
    for round, rank in enumerate(RANKS, start=1):
        was = alone.held_out_loss(RANKS[round - 2] if round > 1 else rank)
        losses.append(alone.play(rank, round))
        assert losses[-1] == pytest.approx(was, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


def test_directions_that_a_device_is_no_longer_sent_stay_as_they_are(desk: Desk) -> None:
    alone = Alone(desk, tail=False)
    alone.play(8, 1)
    wide = alone.adapter
    alone.play(4, 2)
    sent, returned = alone.last
    for name, state in wide.matrices.items():
        change = returned[name].product() - sent.trained[name].product()
        assert np.linalg.norm(change) > 1e-3
        assert returned[name].rank == 4 < state.rank == 8
        joined = alone.adapter.matrices[name].product()
        np.testing.assert_allclose(joined, state.product() + change, atol=1e-5)


def test_the_optimisers_memory_goes_on_over_switches_of_rank(desk: Desk) -> None:
    alone = Alone(desk, tail=True)
    for round, rank in enumerate(RANKS, start=1):
        alone.play(rank, round)
        memory = alone.agent._carried.optimizer
        assert memory is not None
        assert set(memory.steps.values()) == {4 * round}
        for name, squares in memory.squares.items():
            matrix = next(m for m in alone.matrices if name.startswith(m.name))
            wide = matrix.in_features if name.endswith(".a") else matrix.out_features
            assert squares.shape == (wide,)
