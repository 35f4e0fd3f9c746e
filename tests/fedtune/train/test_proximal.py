"""FedProx on products: its gradient, what it leaves alone, and that it holds a device back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.lora.linear import Factors
from fedtune.model.backbone import BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import DevicePlan, Dispatch, LoraFactors, MatrixForm
from fedtune.train.compute import LossScale
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.proximal import Proximal, make_proximal
from fedtune.train.round import train_round
from fedtune.wire.messages import OptimizerSpec

SGD = OptimizerSpec("sgd", 0.5, 0.5, beta1=0.0, max_gradient_norm=0.0)
OUT, IN, RANK, SCALE, MU = 7, 9, 3, 0.5, 0.3


def values(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pair(seed: int = 0) -> Factors:
    a, b = values(RANK, IN, seed=seed), values(OUT, RANK, seed=seed + 1)
    tails = torch.zeros(0, IN, dtype=torch.float64), torch.zeros(OUT, 0, dtype=torch.float64)
    return Factors(a.requires_grad_(), b.requires_grad_(), *tails, SCALE)


def move(factors: Factors, seed: int = 5) -> None:
    """Both factors elsewhere, with gradients of zero."""
    with torch.no_grad():
        factors.a.add_(values(RANK, IN, seed=seed))
        factors.b.add_(values(OUT, RANK, seed=seed + 1))
    factors.a.grad, factors.b.grad = torch.zeros_like(factors.a), torch.zeros_like(factors.b)


def gradients(factors: Factors) -> tuple[Tensor, Tensor]:
    assert factors.a.grad is not None
    assert factors.b.grad is not None
    return factors.a.grad, factors.b.grad


def test_the_gradient_is_that_of_the_distance_of_the_products() -> None:
    factors = pair()
    start = (SCALE * factors.b @ factors.a).detach()
    proximal = Proximal({"w": factors}, {}, MU)
    move(factors)
    term = MU / 2 * (SCALE * factors.b @ factors.a - start).square().sum()
    expected = torch.autograd.grad(term, (factors.a, factors.b))
    proximal.add()
    torch.testing.assert_close(gradients(factors), expected)


def test_it_adds_to_the_gradient_that_is_there_and_is_nothing_at_the_start() -> None:
    factors = pair()
    proximal = Proximal({"w": factors}, {}, 100.0)
    factors.a.grad, factors.b.grad = torch.ones_like(factors.a), torch.full_like(factors.b, 2.0)
    proximal.add()
    assert torch.equal(factors.a.grad, torch.ones_like(factors.a))
    assert torch.equal(factors.b.grad, torch.full_like(factors.b, 2.0))


def test_the_pull_on_the_product_is_the_same_for_every_basis_of_the_directions() -> None:
    """(B M, M^-1 A) with M orthonormal: the gradients turn with the factors."""
    turn = torch.linalg.qr(values(RANK, RANK, seed=9)).Q
    one = pair()
    with torch.no_grad():
        other = replace(one, a=turn.t() @ one.a, b=one.b @ turn)
    other.a.requires_grad_()
    other.b.requires_grad_()
    terms = [Proximal({"w": factors}, {}, MU) for factors in (one, other)]
    move(one)
    with torch.no_grad():
        other.a.copy_(turn.t() @ one.a)
        other.b.copy_(one.b @ turn)
    other.a.grad, other.b.grad = torch.zeros_like(other.a), torch.zeros_like(other.b)
    for term in terms:
        term.add()
    (by_a, by_b), (turned_a, turned_b) = gradients(one), gradients(other)
    torch.testing.assert_close(turned_a, turn.t() @ by_a)
    torch.testing.assert_close(turned_b, by_b @ turn)


def test_a_turn_of_the_directions_that_leaves_the_product_is_not_pulled_at() -> None:
    factors = pair()
    proximal = Proximal({"w": factors}, {}, MU)
    turn = torch.linalg.qr(values(RANK, RANK, seed=9)).Q
    with torch.no_grad():
        factors.a.copy_(turn.t() @ factors.a)
        factors.b.copy_(factors.b @ turn)
    factors.a.grad, factors.b.grad = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
    proximal.add()
    for found in gradients(factors):
        assert found.abs().max() < 1e-12


def test_parameters_trained_whole_are_pulled_back_as_they_are() -> None:
    head = torch.tensor([1.0, 2.0], requires_grad=True)
    proximal = Proximal({}, {"head": head}, 0.5)
    with torch.no_grad():
        head.add_(torch.tensor([2.0, -4.0]))
    head.grad = torch.tensor([1.0, 1.0])
    proximal.add()
    assert head.grad.tolist() == [2.0, -1.0]


def test_what_is_not_trained_is_left_alone() -> None:
    fixed, frozen = pair(), pair(3)
    fixed.a.requires_grad_(False)  # s2ft
    for tensor in (frozen.a, frozen.b):
        tensor.requires_grad_(False)
    proximal = Proximal({"w": fixed, "v": frozen}, {}, MU)
    start = (SCALE * fixed.b @ fixed.a).detach()
    with torch.no_grad():
        fixed.b.add_(1.0)
    fixed.b.grad = torch.zeros_like(fixed.b)
    term = MU / 2 * (SCALE * fixed.b @ fixed.a - start).square().sum()
    (expected,) = torch.autograd.grad(term, (fixed.b,))
    proximal.add()
    torch.testing.assert_close(fixed.b.grad, expected)
    assert fixed.a.grad is frozen.a.grad is frozen.b.grad is None


def test_a_strength_of_0_is_no_term() -> None:
    assert make_proximal({"w": pair()}, {}, 0.0) is None
    assert make_proximal({"w": pair()}, {}, 0.1) is not None


@pytest.mark.parametrize("scaled", [False, True])
def test_the_term_is_added_after_the_loss_scale_is_out_and_before_clipping(scaled: bool) -> None:
    head = torch.tensor([0.0], requires_grad=True)
    proximal = Proximal({}, {"head": head}, 2.0)
    with torch.no_grad():
        head.fill_(1.0)
    scale = LossScale(8.0) if scaled else None
    spec = replace(SGD, max_gradient_norm=5.0)
    optimizer = RoundOptimizer({"h": head}, spec, 1, loss_scale=scale, proximal=proximal)
    head.grad = torch.tensor([1.0 * (8.0 if scaled else 1.0)])
    optimizer.step()
    assert head.item() == pytest.approx(1.0 - 0.5 * (1.0 + 2.0))
    head.grad = torch.tensor([100.0 * (8.0 if scaled else 1.0)])
    optimizer.step()
    assert head.item() == pytest.approx(-0.5 - 0.5 * 5.0)


# ---------------------------------------------------------------- in a round


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


def batches(steps: int = 6, size: int = 4) -> list[list[Sample]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 24, (steps, size))
    return [
        [Sample(rng.integers(3, 200, n).astype(np.int32), np.arange(n) >= n // 3) for n in row]
        for row in lengths
    ]


def distance(folder: Path, spec: OptimizerSpec, cut: DevicePlan) -> float:
    """How far a round moves the products."""
    shapes = read_shapes(folder, ("all-linear",)).by_name()
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
    backbone = shelf.get("causal-lm", (), dict.fromkeys(shapes, MatrixForm("fp32")))
    rng = np.random.default_rng(1)
    sent = {
        name: LoraFactors(
            rng.normal(0, 0.2, (2, shape.in_features)).astype(np.float32),
            rng.normal(0, 0.2, (shape.out_features, 2)).astype(np.float32),
            SCALE,
        )
        for name, shape in shapes.items()
    }
    steps: Sequence[Sequence[Sample]] = batches()
    result = train_round(backbone, steps, Dispatch(sent), cut, spec, task="causal-lm", pad_id=2)
    moved = [result.factors[name].product() - sent[name].product() for name in sent]
    return float(np.sqrt(sum(np.square(m).sum() for m in moved)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_stronger_pull_ends_the_round_nearer_to_its_start(
    tiny_llama: Path, name: str, checkpointing: bool
) -> None:
    rate = 0.05 if name == "sgd" else 1e-2
    spec = replace(SGD, name=name, learning_rate=rate, final_learning_rate=rate)  # type: ignore[arg-type]
    cut = DevicePlan("site", (), 2, 4, 32, 6, checkpointing=checkpointing)
    found = [distance(tiny_llama, replace(spec, proximal=mu), cut) for mu in (0.0, 0.3, 3.0)]
    assert found[0] > found[1] > found[2] > 0
