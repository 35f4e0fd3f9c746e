"""One round's optimiser: its learning-rate line, its clipping, and the rules."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedtune.errors import MissingExtraError
from fedtune.train.compute import LossScale
from fedtune.train.optimizer import RoundOptimizer
from fedtune.wire.messages import OptimizerSpec

SGD = OptimizerSpec("sgd", 0.5, 0.5, beta1=0.0, max_gradient_norm=0.0)
ADAMW = OptimizerSpec("adamw", 0.01, 0.01, max_gradient_norm=0.0)
EIGHT_BIT = replace(ADAMW, name="adamw-8bit")


def weights(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def moved(spec: OptimizerSpec, gradient: Tensor, steps: int = 1) -> Tensor:
    """How far weights of zero go under one gradient, again and again."""
    parameter = torch.zeros_like(gradient, requires_grad=True)
    optimizer = RoundOptimizer({"w": parameter}, spec, steps)
    for _ in range(steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize(
    ("steps", "rates"), [(1, [1.0]), (2, [1.0, 0.5]), (5, [1.0, 0.875, 0.75, 0.625, 0.5])]
)
def test_the_learning_rate_is_a_line_from_the_first_step_to_the_last(
    steps: int, rates: list[float]
) -> None:
    parameter = weights(0.0)
    optimizer = RoundOptimizer({"w": parameter}, replace(SGD, learning_rate=1.0), steps)
    taken, before = [], 0.0
    for _ in range(steps):
        parameter.grad = torch.tensor([-1.0])
        optimizer.step()
        taken.append(parameter.item() - before)
        before = parameter.item()
    assert taken == pytest.approx(rates)


def test_a_step_clears_the_gradients() -> None:
    parameter = weights(1.0)
    parameter.grad = torch.ones(1)
    RoundOptimizer({"w": parameter}, SGD, 1).step()
    assert parameter.grad is None


def test_gradients_are_clipped_over_all_parameters_together() -> None:
    one, two = weights(0.0), weights(0.0)
    optimizer = RoundOptimizer({"one": one, "two": two}, replace(SGD, max_gradient_norm=1.0), 1)
    one.grad, two.grad = torch.tensor([30.0]), torch.tensor([40.0])
    optimizer.step()
    assert (one.item(), two.item()) == pytest.approx((-0.5 * 0.6, -0.5 * 0.8), rel=1e-4)


def test_short_gradients_and_a_norm_of_0_are_left_alone() -> None:
    short = moved(replace(SGD, max_gradient_norm=1.0), torch.tensor([0.3, 0.4]))
    assert short.tolist() == pytest.approx([-0.15, -0.2])
    assert moved(SGD, torch.tensor([30.0])).item() == pytest.approx(-15.0)


def test_beta1_is_the_momentum_of_sgd() -> None:
    found = moved(replace(SGD, beta1=0.9), torch.ones(1), steps=3).item()
    assert found == pytest.approx(-0.5 * (1 + 1.9 + 2.71))


def test_the_first_step_of_adamw_is_the_learning_rate_whatever_the_gradient() -> None:
    found = moved(ADAMW, torch.tensor([1e-3, -7.0, 400.0]))
    assert found.tolist() == pytest.approx([-0.01, 0.01, -0.01], rel=1e-3)


@pytest.mark.parametrize("spec", [ADAMW, SGD, replace(SGD, beta1=0.9)])
def test_weight_decay_shrinks_weights_alike_in_every_step(spec: OptimizerSpec) -> None:
    parameter = weights(2.0)
    optimizer = RoundOptimizer({"w": parameter}, replace(spec, weight_decay=0.1), 3)
    for _ in range(3):
        parameter.grad = torch.zeros(1)
        optimizer.step()
    assert parameter.item() == pytest.approx(2.0 * (1 - spec.learning_rate * 0.1) ** 3)


def test_betas_reach_adamw() -> None:
    optimizer = RoundOptimizer({"w": weights(0.0)}, replace(ADAMW, beta1=0.5, beta2=0.7), 1)
    assert optimizer.inner.param_groups[0]["betas"] == (0.5, 0.7)


def test_a_name_may_have_a_share_of_the_learning_rate() -> None:
    one, two = weights(0.0), weights(0.0)
    optimizer = RoundOptimizer({"one": one, "two": two}, SGD, 1, rate_shares={"two": 0.25})
    one.grad, two.grad = torch.tensor([1.0]), torch.tensor([1.0])
    optimizer.step()
    assert (one.item(), two.item()) == pytest.approx((-0.5, -0.125))


def test_a_step_with_gradients_that_are_not_finite_is_skipped() -> None:
    parameter, scale = weights(0.0), LossScale(value=2.0)
    optimizer = RoundOptimizer(
        {"w": parameter}, replace(SGD, final_learning_rate=0.25), 2, loss_scale=scale
    )
    parameter.grad = torch.tensor([float("inf")])
    optimizer.step()
    assert parameter.item() == 0.0
    assert parameter.grad is None
    parameter.grad = torch.tensor([1.0])  # of a loss that was multiplied by the new scale, 1
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.25)


def test_eight_bit_adamw_goes_where_adamw_goes() -> None:
    pytest.importorskip("bitsandbytes")
    gradient = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    exact, rounded = (moved(spec, gradient, steps=5) for spec in (ADAMW, EIGHT_BIT))
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert not torch.equal(rounded, exact)


def test_eight_bit_adamw_tells_autograd_that_it_changed_a_parameter() -> None:
    pytest.importorskip("bitsandbytes")
    parameter = torch.zeros(64, 128, requires_grad=True)
    before = parameter._version
    parameter.grad = torch.ones(64, 128)
    RoundOptimizer({"w": parameter}, EIGHT_BIT, 1).step()
    assert parameter._version > before


def test_eight_bit_adamw_without_bitsandbytes_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"bitsandbytes.*adamw-8bit|adamw-8bit.*bitsandb"):
        RoundOptimizer({"w": weights(0.0)}, EIGHT_BIT, 1)
