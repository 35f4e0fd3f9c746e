"""The gradient of one optimiser step against the loss of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.lora.linear import Factors, attach
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.loss import collate, loss_sum
from fedtune.model.shapes import read_shapes
from fedtune.records import MatrixForm
from fedtune.train.step import accumulate

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: int = -1


@pytest.fixture
def adapted(tiny_llama: Path) -> Backbone:
    shapes = read_shapes(tiny_llama, ("all-linear",)).by_name()
    shelf = BackboneShelf(tiny_llama, CPU, keep_base=False)
    backbone = shelf.get("causal-lm", (), dict.fromkeys(shapes, MatrixForm("fp32")))
    generator = torch.Generator().manual_seed(0)
    attach(
        backbone.layers,
        {
            name: Factors(
                torch.randn(2, s.in_features, generator=generator).mul_(0.2).requires_grad_(),
                torch.randn(s.out_features, 2, generator=generator).mul_(0.2).requires_grad_(),
                torch.zeros(0, s.in_features),
                torch.zeros(s.out_features, 0),
                1.0,
            )
            for name, s in shapes.items()
        },
    )
    return backbone


def batch() -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = (5, 17, 9, 24)
    return [
        Sample(rng.integers(3, 200, n).astype(np.int32), np.arange(n) >= n // 3) for n in lengths
    ]


def gradients(backbone: Backbone) -> list[torch.Tensor]:
    """Of every factor; they are forgotten."""
    found = []
    for _, layer in sorted(backbone.layers.items()):
        assert layer.factors is not None
        for factor in (layer.factors.a, layer.factors.b):
            assert factor.grad is not None
            found.append(factor.grad)
            factor.grad = None
    return found


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_a_step_has_the_loss_and_the_gradient_of_the_mean_over_all_units(
    adapted: Backbone, micro_batch: int, factor: float
) -> None:
    whole = loss_sum(adapted.model, collate(batch(), 2, CPU), "causal-lm")
    (whole.total / whole.units).backward()
    expected = gradients(adapted)
    loss = accumulate(adapted, batch(), micro_batch, "causal-lm", 2, factor)
    assert loss == pytest.approx(whole.total.item() / whole.units, rel=1e-6)
    for found, right in zip(gradients(adapted), expected, strict=True):
        torch.testing.assert_close(found / factor, right, rtol=1e-4, atol=1e-6)
