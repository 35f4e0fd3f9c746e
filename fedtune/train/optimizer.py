"""The optimiser of one round on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from fedtune.wire.messages import OptimizerSpec


class RoundOptimizer:
    """An optimiser with its learning-rate line and gradient clipping.

    Args:
        steps: optimiser steps in the round; sets the slope of the learning rate.
    """

    def __init__(self, parameters: Sequence[Tensor], settings: OptimizerSpec, steps: int) -> None:
        self._parameters, self._settings, self._steps = list(parameters), settings, steps
        self._taken = 0
        self.inner = _build(self._parameters, settings)

    def step(self) -> None:
        """Clip, take one step at the current learning rate, and clear the gradients."""
        share = self._taken / max(1, self._steps - 1)
        first, last = self._settings.learning_rate, self._settings.final_learning_rate
        rate = first + (last - first) * share
        for group in self.inner.param_groups:
            group["lr"] = rate
        if self._settings.max_gradient_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_gradient_norm)
        if isinstance(self.inner, SGD):  # AdamW decays by itself
            _decay(self._parameters, rate * self._settings.weight_decay)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        self._taken += 1


@torch.no_grad()
def _decay(parameters: Sequence[Tensor], share: float) -> None:
    """Decoupled weight decay; SGD's own would run through its momentum."""
    if share > 0:
        for parameter in parameters:
            parameter.mul_(1.0 - share)


def _build(parameters: Sequence[Tensor], settings: OptimizerSpec) -> Optimizer:
    if settings.name == "sgd":
        return SGD(parameters, lr=settings.learning_rate, momentum=settings.beta1)
    return AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
