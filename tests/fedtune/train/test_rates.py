"""Learning rates by block and by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedtune.records import TrainingWay
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.rates import layer_shares
from fedtune.wire.messages import OptimizerSpec

SGD = OptimizerSpec("sgd", 0.5, 0.5, beta1=0.0, max_gradient_norm=0.0)
ADAMW = OptimizerSpec("adamw", 0.01, 0.01, max_gradient_norm=0.0)
NAMES = ("model.layers.0.q_proj", "model.layers.1.q_proj", "encoder.layer.3.dense")


def stepped(spec: OptimizerSpec, b: Tensor, name: str = "w.b", steps: int = 1) -> Tensor:
    """Where B is after steps under a gradient of ones."""
    parameter = b.clone().requires_grad_()
    optimizer = RoundOptimizer({name: parameter}, spec, steps)
    for _ in range(steps):
        parameter.grad = torch.ones_like(b)
        optimizer.step()
    return parameter.detach()


def allora(spec: OptimizerSpec, eta: float = 1.0) -> OptimizerSpec:
    return replace(spec, way=TrainingWay("allora", allora_eta=eta))


def test_every_block_below_the_top_learns_at_a_share_of_the_one_above() -> None:
    shares = layer_shares(NAMES, 0.5)
    assert [shares[f"{name}.{side}"] for name in NAMES for side in "ab"] == [
        0.125,
        0.125,
        0.25,
        0.25,
        1.0,
        1.0,
    ]


def test_no_decay_gives_no_shares() -> None:
    assert layer_shares(NAMES, 1.0) == {}
    assert layer_shares((), 0.5) == {}


@pytest.mark.parametrize("spec", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_row_of_b_moves_by_its_step_over_the_root_of_its_norm_and_the_floor(
    spec: OptimizerSpec,
) -> None:
    b = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.3, 0.4]])
    plain, adapted = stepped(spec, b) - b, stepped(allora(spec, eta=2.0), b) - b
    factors = (adapted / plain).tolist()
    expected = [1 / math.sqrt(norm + 0.25) for norm in (0.0, 5.0, 0.5)]
    for row, factor in zip(factors, expected, strict=True):
        assert row == pytest.approx([factor, factor], rel=1e-3)


def test_a_row_that_is_zero_moves_eta_times_as_far() -> None:
    zero = torch.zeros(2, 3)
    assert torch.allclose(stepped(allora(SGD, eta=4.0), zero), 4.0 * stepped(SGD, zero))


@pytest.mark.parametrize("name", ["w.a", "dense.head.b"])
def test_a_and_heads_move_as_ever(name: str) -> None:
    b = torch.ones(2, 2)
    assert torch.equal(stepped(allora(SGD), b, name), stepped(SGD, b, name))
    assert not torch.equal(stepped(allora(SGD), b, "w.b"), stepped(SGD, b, "w.b"))


def test_what_has_no_gradient_does_not_decay_under_sgd() -> None:
    parameter = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    optimizer = RoundOptimizer(
        {"one": parameter, "two": other}, replace(SGD, weight_decay=0.1), steps=1
    )
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert other.tolist() == [1.0, 1.0]
    assert parameter.tolist() != [1.0, 1.0]
