"""GreenTrainer: which matrices train under a budget of operations, by what they gain for them.

A backward pass costs what handing the gradient down to the lowest trained matrix costs, and the
gradients of the trained factors themselves. Given the importance of each matrix, the choice that
adds up to most within the budget is found by dynamic programming.

Matrices that are not chosen give back what they were sent: their difference is zero, and the join
is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from fedtune.lora.linear import Factors
from fedtune.model.backbone import Backbone

_STEPS: Final = 1000
"""Into how many parts the budget is cut; costs are rounded up to parts, so it is never passed."""


@dataclass(frozen=True, slots=True)
class MatrixCost:
    """Operations per token of a matrix in the backward pass.

    Attributes:
        passing: of handing the gradient on to what is below it.
        training: of the gradients of its factors.
    """

    name: str
    passing: int
    training: int


def backward_costs(backbone: Backbone, factors: Mapping[str, Factors]) -> list[MatrixCost]:
    """The costs of all adapted matrices, from the loss downwards.

    Matrices that share an input count as one behind the other, which errs to the costly side;
    attention, norms and the head are left out, as they are much less or cannot be chosen.
    """
    names = {id(layer): name for name, layer in backbone.layers.items()}
    forward = [names[id(m)] for m in backbone.model.modules() if id(m) in names]
    return [_cost(name, backbone, factors.get(name)) for name in reversed(forward)]


def _cost(name: str, backbone: Backbone, pair: Factors | None) -> MatrixCost:
    layer = backbone.layers[name]
    rank = pair.a.shape[0] if pair is not None and pair.trains else 0
    held = 0 if pair is None else pair.a.shape[0] + pair.tail_a.shape[0]
    both = layer.out_features + layer.in_features
    passing = 2 * layer.out_features * layer.in_features + 2 * held * both
    # The gradients of x A^T, of B and of A.
    return MatrixCost(name, passing, 2 * rank * (both + layer.out_features))


def whole_cost(costs: Sequence[MatrixCost]) -> int:
    """Operations per token of a backward pass that trains every matrix with factors."""
    trained = [index for index, cost in enumerate(costs) if cost.training]
    passed = sum(cost.passing for cost in costs[: max(trained, default=0)])
    return passed + sum(cost.training for cost in costs)


def cost_of(chosen: frozenset[str], costs: Sequence[MatrixCost]) -> int:
    """Operations per token of a backward pass that trains the chosen matrices."""
    picked = [index for index, cost in enumerate(costs) if cost.name in chosen]
    passed = sum(cost.passing for cost in costs[: max(picked, default=0)])
    return passed + sum(costs[index].training for index in picked)


def choose(
    importance: Mapping[str, float], costs: Sequence[MatrixCost], budget: float
) -> frozenset[str]:
    """The matrices of largest summed importance whose backward pass stays within the budget.

    Never none: if not even one fits, the trained one nearest to the loss.

    Args:
        importance: name -> not negative; matrices without one cannot be chosen.
        costs: from the loss downwards.
        budget: operations per token.

    Source:
        GreenTrainer, arXiv 2309.13192, section 3.3: the same recursion over the lowest chosen
        tensor, with a matrix's pair of factors for a tensor.
    """
    part = budget / _STEPS
    # best[i][q]: most importance out of the first i matrices, whose own gradients cost q parts.
    best = np.zeros((len(costs) + 1, _STEPS + 1))
    top, lowest, left = -1.0, -1, 0
    passed = 0
    for index, cost in enumerate(costs):
        best[index + 1] = best[index]
        gain = importance.get(cost.name)
        if gain is not None:
            parts = _parts(cost, part)
            spare = int((budget - passed) // part) - parts
            if spare >= 0 and gain + best[index][spare] > top:
                top, lowest, left = gain + best[index][spare], index, spare
            if parts <= _STEPS:
                with_it = best[index][: _STEPS + 1 - parts] + gain
                best[index + 1][parts:] = np.maximum(best[index + 1][parts:], with_it)
        passed += cost.passing
    if lowest < 0:
        return frozenset(next(([c.name] for c in costs if c.name in importance), []))
    chosen = [costs[lowest].name]
    for index in range(lowest - 1, -1, -1):
        if best[index + 1][left] > best[index][left]:
            chosen.append(costs[index].name)
            left -= _parts(costs[index], part)
    return frozenset(chosen)


def _parts(cost: MatrixCost, part: float) -> int:
    return int(-(-cost.training // part))


def importances(factors: Mapping[str, Factors], *, squared: bool) -> dict[str, float] | None:
    """How much a first step on each matrix lowers the loss, to first order and up to a factor.

    That is the gradient times the step. A step of SGD is the gradient, and AdamW's first one has
    the same size in every entry: their products are the sums of squares and of magnitudes.

    Args:
        squared: for SGD.

    Returns:
        None if a gradient is not finite, as under a loss scale that is too large.
    """
    found = {}
    for name, pair in factors.items():
        gradients = [t.grad for t in (pair.a, pair.b) if t.grad is not None]
        if pair.trains and gradients:
            power = [g.double().square() if squared else g.double().abs() for g in gradients]
            found[name] = sum(p.sum() for p in power)
    if not found:
        return {}
    values = torch.stack([torch.as_tensor(v) for v in found.values()])
    if not bool(values.isfinite().all()):
        return None
    return dict(zip(found, values.tolist(), strict=True))
