"""A round of several simulated devices in one pass over the backbone that they share.

Each device has rows of its own in every pass: its samples, its factors, its losses, its optimiser
state. What it computes is call by call what `train_round` computes for it alone, so that its bits
are the same; what the devices share is the unpacking of the frozen matrices and the many small
calls around the products, which on a small model are most of the time.

Devices go together when their plans cut the batches alike. Their ranks may differ.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.lora.beside import attached_beside
from fedtune.lora.linear import Rows
from fedtune.model.backbone import Backbone
from fedtune.model.loss import (
    Batch,
    TokenisedSample,
    loss_sums,
    loss_units,
    prepare,
    sums_together,
)
from fedtune.records import DevicePlan, Dispatch, TaskName
from fedtune.train.batches import micro_batches
from fedtune.train.memory import OptimizerMemory
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.proximal import make_proximal
from fedtune.train.rates import layer_shares
from fedtune.train.round import (
    RoundResult,
    device_factors,
    read_back,
    set_checkpointing,
    trained_tensors,
)
from fedtune.wire.messages import OptimizerSpec

_TASK: TaskName = "causal-lm"


@dataclass(frozen=True, slots=True)
class Share:
    """One device's part in a round.

    Attributes:
        batches: one optimiser step's samples each; as many as the plan's `local_steps`.
        memory: as in `train_round`.
    """

    batches: Sequence[Sequence[TokenisedSample]]
    dispatch: Dispatch
    memory: OptimizerMemory | None = None


def train_side_by_side(
    backbone: Backbone,
    shares: Sequence[Share],
    plan: DevicePlan,
    optimizer: OptimizerSpec,
    *,
    pad_id: int,
) -> list[RoundResult]:
    """Train several devices for one round; the results are in the order of the shares.

    Args:
        backbone: the same for all.
        plan: of any of the devices; micro-batch, checkpointing and steps are those of all.
        optimizer: of all; its way must be one that `shares_a_pass`.

    Raises:
        ModelError: the backbone's model does not take packed samples.
        ProtocolError: a dispatch does not fit the backbone.
    """
    started = time.perf_counter()
    with backbone.lock:
        if not sums_together(backbone.model):
            raise ModelError(
                f"{type(backbone.model).__name__} does not take packed samples, so devices cannot "
                "train side by side; train them one by one"
            )
        devices = [device_factors(backbone, s.dispatch, trainable=True) for s in shares]
        with attached_beside(backbone.layers, devices) as rows:
            try:
                set_checkpointing(backbone, plan.checkpointing)
                steps = len(shares[0].batches)
                steppers = [
                    RoundOptimizer(
                        trained_tensors(factors),
                        optimizer,
                        steps,
                        memory=share.memory,
                        rate_shares=layer_shares(backbone.layers, optimizer.way.layer_rate_decay),
                        proximal=make_proximal(factors, {}, optimizer.proximal),
                    )
                    for factors, share in zip(devices, shares, strict=True)
                ]
                losses: list[list[float]] = [[] for _ in shares]
                for step in range(steps):
                    found = _accumulate(backbone, shares, step, plan.micro_batch, pad_id, rows)
                    for stepper in steppers:
                        stepper.step()
                    for own, loss in zip(losses, found, strict=True):
                        own.append(loss)
                for stepper in steppers:
                    stepper.keep()
            finally:
                set_checkpointing(backbone, False)
    seconds = (time.perf_counter() - started) / len(shares)
    return [
        RoundResult(
            read_back(factors, share.dispatch),
            {},
            sum(len(batch) for batch in share.batches),
            sum(loss_units(batch, _TASK) for batch in share.batches),
            tuple(own),
            seconds,
        )
        for factors, share, own in zip(devices, shares, losses, strict=True)
    ]


def _accumulate(
    backbone: Backbone,
    shares: Sequence[Share],
    step: int,
    micro_batch: int,
    pad_id: int,
    rows: Rows,
) -> list[float]:
    """What `fedtune.train.step.accumulate` does, for all devices at once."""
    every = [share.batches[step] for share in shares]
    units = [loss_units(batch, _TASK) for batch in every]
    device = next(backbone.model.parameters()).device
    losses = torch.zeros(len(shares), dtype=torch.float64, device=device)
    cut = [micro_batches(batch, micro_batch) for batch in every]
    for parts in zip(*cut, strict=True):
        batches = [prepare(backbone.model, part, pad_id, _TASK) for part in parts]
        rows.bounds = _bounds(batches)
        totals = [found.total for found in loss_sums(backbone.model, batches)]
        _mean_of_each(totals, units).backward()  # type: ignore[no-untyped-call]  # torch's
        losses += torch.stack([total.detach() for total in totals])
    return [float(loss) / count for loss, count in zip(losses, units, strict=True)]


def _bounds(batches: Sequence[Batch]) -> tuple[int, ...]:
    return tuple(running_sums((batch.tokens.shape[1] for batch in batches), initial=0))


def _mean_of_each(totals: Sequence[Tensor], units: Sequence[int]) -> Tensor:
    """One number whose gradient in each total is that of the device's own mean."""
    means = [total * (1.0 / count) for total, count in zip(totals, units, strict=True)]
    return torch.stack(means).sum()
