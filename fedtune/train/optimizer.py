"""The optimiser of one round on one device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from fedtune.quant.bnb import import_bitsandbytes
from fedtune.train.compute import LossScale
from fedtune.train.memory import OptimizerMemory
from fedtune.train.proximal import Proximal
from fedtune.train.rates import RowRates
from fedtune.wire.messages import OptimizerSpec


class RoundOptimizer:
    """An optimiser with its learning-rate line and gradient clipping.

    Args:
        parameters: name -> what is trained.
        steps: optimiser steps in the round; sets the slope of the learning rate.
        memory: what earlier rounds left, and where this one leaves its own; None: begin anew.
        loss_scale: by which the losses were multiplied; None: they were not.
        rate_shares: name -> factor of its learning rate; 1 for names that are absent.
        keeps_gradients: set gradients to zero after a step instead of dropping them, because a
            recorded step writes to where they are.
        proximal: added to the gradients before they are clipped; None: nothing is.

    Raises:
        MissingExtraError: the optimiser needs bitsandbytes and it is not installed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        settings: OptimizerSpec,
        steps: int,
        *,
        memory: OptimizerMemory | None = None,
        loss_scale: LossScale | None = None,
        rate_shares: Mapping[str, float] | None = None,
        keeps_gradients: bool = False,
        proximal: Proximal | None = None,
    ) -> None:
        self._named, self._parameters = dict(parameters), list(parameters.values())
        self._settings, self._steps, self._loss_scale = settings, steps, loss_scale
        self._taken = self._moved = 0  # a step that is skipped is taken and moves nothing
        self._memory, self._keeps_gradients = memory, keeps_gradients
        self._proximal = proximal
        # AdamW alone: the mean of SGD is dropped between rounds, and it has no squares.
        kept = set(memory.squares) if memory is not None and settings.name == "adamw" else set()
        self.inner = _build(_groups(self._named, rate_shares or {}, kept), settings)
        if memory is not None:
            memory.restore(self.inner, self._named)
        allora = settings.way.name == "allora"
        self._rows = RowRates(self._named, settings.way.allora_eta) if allora else None

    def step(self) -> None:
        """Clip, take one step at the current learning rate, and clear the gradients."""
        if self._loss_scale is None or self._loss_scale.unscale(self._parameters):
            self._move()
        self.inner.zero_grad(set_to_none=not self._keeps_gradients)
        self._taken += 1

    def keep(self) -> None:
        """Leave the state for the next round."""
        if self._memory is not None:
            self._memory.store(self.inner, self._named)

    def _move(self) -> None:
        settings = self._settings
        share = self._taken / max(1, self._steps - 1)
        first, last = settings.learning_rate, settings.final_learning_rate
        rate = first + (last - first) * share
        for group in self.inner.param_groups:
            group["lr"] = rate * group["rate_share"]
            if group["resumed"]:
                # torch counts the steps of the squares and takes the fresh mean for an old one,
                # which this corrects. Decay is a share of the learning rate, and gets it back.
                bias = 1.0 - settings.beta1 ** (self._moved + 1)
                group["lr"] /= bias
                group["weight_decay"] = settings.weight_decay * bias
        if self._proximal is not None:
            self._proximal.add()
        if settings.max_gradient_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, settings.max_gradient_norm)
        if isinstance(self.inner, SGD):  # AdamW decays by itself
            for group in self.inner.param_groups:
                _decay(group["params"], group["lr"] * settings.weight_decay)
        if self._rows is None:
            self.inner.step()
        else:
            self._rows.step(self.inner)
        self._moved += 1
        # bitsandbytes writes behind autograd's back, and stacked factors rest on the versions.
        torch.autograd.graph.increment_version(self._parameters)


@torch.no_grad()
def _decay(parameters: Sequence[Tensor], share: float) -> None:
    """Decoupled weight decay; SGD's own would run through its momentum."""
    if share > 0:
        for parameter in parameters:
            if parameter.grad is not None:  # as AdamW does: what is not trained does not shrink
                parameter.mul_(1.0 - share)


def _groups(
    parameters: Mapping[str, Tensor], rate_shares: Mapping[str, float], kept: Collection[str]
) -> list[dict[str, Any]]:  # torch's own type
    """Parameters of the same rate together, in a fixed order."""
    alike: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in parameters.items():
        alike.setdefault((rate_shares.get(name, 1.0), name in kept), []).append(parameter)
    return [
        {"params": held, "rate_share": share, "resumed": resumed}
        for (share, resumed), held in alike.items()
    ]


def _build(groups: list[dict[str, Any]], settings: OptimizerSpec) -> Optimizer:
    if settings.name == "sgd":
        return SGD(groups, lr=settings.learning_rate, momentum=settings.beta1)
    on_cuda = any(p.is_cuda for group in groups for p in group["params"])
    adam: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw-8bit":
        return _eight_bit(groups, adam, on_cuda)
    # One pass over each parameter: on a CPU in a third of the time of `foreach`, rounded otherwise.
    return AdamW(groups, **adam, fused=True)


def _eight_bit(groups: list[dict[str, Any]], adam: dict[str, Any], on_cuda: bool) -> Optimizer:
    """AdamW with 8-bit moments (arXiv 2110.02861); on CUDA they may be paged out to the host."""
    optim = import_bitsandbytes("the optimiser adamw-8bit").optim
    kind = optim.PagedAdamW8bit if on_cuda else optim.AdamW8bit
    optimizer: Optimizer = kind(groups, **adam)
    return optimizer
