"""Muon moves along orthogonal matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedtune.model.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_singular_values_are_brought_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert float(values.min()) > 0.18
    assert float(values.max()) < 1.87


def test_the_direction_is_that_of_the_matrix() -> None:
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = torch.diagonal(left.T @ orthogonalise(matrix) @ right.T)
    assert bool((inner > 0.18).all())


def test_scaling_the_gradient_does_not_change_the_first_step() -> None:
    steps = []
    for factor in (1.0, 1000.0):
        weight = nn.Parameter(torch.zeros(6, 4))
        weight.grad = factor * torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
        Muon([weight], learning_rate=0.1).step()
        steps.append(weight.detach().clone())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-5)


def test_a_quadratic_gets_smaller() -> None:
    generator = torch.Generator().manual_seed(3)
    goal = torch.randn(8, 8, generator=generator)
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], learning_rate=0.05, weight_decay=0.0)
    losses = []
    for _ in range(40):
        loss = (weight - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_matrix_without_a_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    Muon([weight], learning_rate=0.1).step()
    assert torch.equal(weight, torch.ones(3, 3))
