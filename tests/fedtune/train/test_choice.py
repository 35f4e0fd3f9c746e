"""The choice of matrices is the best within its budget, and its costs are those of the step."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.lora.linear import Factors
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.shapes import read_shapes
from fedtune.records import MatrixForm
from fedtune.train.choice import (
    MatrixCost,
    backward_costs,
    choose,
    cost_of,
    importances,
    whole_cost,
)


def instance(seed: int, count: int = 8) -> tuple[dict[str, float], list[MatrixCost]]:
    rng = np.random.default_rng(seed)
    costs = [
        MatrixCost(f"m{i}", int(rng.integers(500, 2000)), int(rng.integers(100, 900)))
        for i in range(count)
    ]
    return {cost.name: float(rng.random()) for cost in costs}, costs


def best_by_hand(importance: dict[str, float], costs: list[MatrixCost], budget: float) -> float:
    names = list(importance)
    subsets = chain.from_iterable(combinations(names, k) for k in range(1, len(names) + 1))
    fits = [s for s in subsets if cost_of(frozenset(s), costs) <= budget]
    return max(sum(importance[name] for name in s) for s in fits)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.7, 1.0])
def test_the_choice_is_the_best_of_all_subsets_within_the_budget(seed: int, share: float) -> None:
    importance, costs = instance(seed)
    budget = share * whole_cost(costs)
    chosen = choose(importance, costs, budget)
    assert cost_of(chosen, costs) <= budget
    gained = sum(importance[name] for name in chosen)
    # Costs are rounded up to thousandths of the budget: at most one for each matrix is lost.
    least = best_by_hand(importance, costs, budget * (1 - (len(costs) + 1) / 1000))
    assert gained >= least - 1e-9


def test_a_whole_budget_trains_everything_but_for_rounding_and_none_trains_the_nearest() -> None:
    importance, costs = instance(0)
    assert len(choose(importance, costs, 1.02 * whole_cost(costs))) == len(costs)
    assert choose(importance, costs, 1.0) == {"m0"}
    assert choose({"m3": 1.0}, costs, 1.0) == {"m3"}
    assert choose({}, costs, 1e9) == frozenset()


def test_matrices_without_factors_are_passed_but_never_chosen() -> None:
    costs = [MatrixCost("top", 1000, 0), MatrixCost("low", 1000, 100)]
    assert whole_cost(costs) == 1100
    assert choose({"low": 1.0}, costs, 1200) == {"low"}


def backbone(folder: Path) -> Backbone:
    names = read_shapes(folder, ("all-linear",)).by_name()
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False)
    return shelf.get("causal-lm", (), dict.fromkeys(names, MatrixForm("fp32")))


def pair(out: int, size: int, rank: int) -> Factors:
    return Factors(
        torch.ones(rank, size).requires_grad_(),
        torch.ones(out, rank).requires_grad_(),
        torch.zeros(0, size),
        torch.zeros(out, 0),
        1.0,
    )


def test_costs_go_from_the_loss_downwards_and_count_products(tiny_llama: Path) -> None:
    base = backbone(tiny_llama)
    down = "model.layers.1.mlp.down_proj"
    costs = backward_costs(base, {down: pair(32, 64, 4)})
    order = [cost.name.removeprefix("model.layers.") for cost in costs]
    assert order[0] == "1.mlp.down_proj"
    assert order[-1] == "0.self_attn.q_proj"
    assert len(order) == 14
    assert costs[0].passing == 2 * 32 * 64 + 2 * 4 * (32 + 64)
    assert costs[0].training == 2 * 4 * 32 + 2 * 4 * 32 + 2 * 4 * 64
    assert costs[1].training == 0


def test_importances_are_sums_of_magnitudes_or_squares() -> None:
    one, frozen = pair(2, 3, 1), pair(2, 3, 1)
    for tensor in (frozen.a, frozen.b):
        tensor.requires_grad_(False)
    one.a.grad, one.b.grad = torch.full((1, 3), -2.0), torch.zeros(2, 1)
    assert importances({"one": one, "frozen": frozen}, squared=False) == {"one": 6.0}
    assert importances({"one": one, "frozen": frozen}, squared=True) == {"one": 12.0}


def test_gradients_that_are_not_finite_say_nothing() -> None:
    one = pair(2, 3, 1)
    one.a.grad, one.b.grad = torch.full((1, 3), float("inf")), torch.zeros(2, 1)
    assert importances({"one": one}, squared=False) is None
