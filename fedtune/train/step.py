"""The gradient of one optimiser step: the unit that a round repeats and a benchmark times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtune.model.backbone import Backbone
from fedtune.model.loss import TokenisedSample, loss_sum, loss_units, prepare
from fedtune.records import TaskName
from fedtune.train.batches import micro_batches
from fedtune.train.graph import StepGraphs


def accumulate(
    backbone: Backbone,
    batch: Sequence[TokenisedSample],
    micro_batch: int,
    task: TaskName,
    pad_id: int,
    loss_factor: float = 1.0,
    graphs: StepGraphs | None = None,
    before_pass: Callable[[], None] | None = None,
) -> float:
    """Backpropagate one optimiser step's mean loss, micro-batch by micro-batch.

    Args:
        loss_factor: multiplies the loss that is backpropagated, so that float16 gradients keep
            off zero; the optimiser divides by it.
        graphs: recorded steps of the factors that are on the backbone; None: without.
        before_pass: called before every micro-batch; may raise to stop.

    Returns:
        The mean loss per unit, without the factor.
    """
    device = next(backbone.model.parameters()).device
    units = loss_units(batch, task)
    # Summed where it is computed: reading it would make an accelerator wait at every micro-batch.
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for part in micro_batches(batch, micro_batch):
        if before_pass is not None:
            before_pass()
        scale = loss_factor / units
        total = None if graphs is None else graphs.add(backbone, part, pad_id, scale)
        loss += _plainly(backbone, part, task, pad_id, scale) if total is None else total
    return float(loss) / units


def _plainly(
    backbone: Backbone,
    part: Sequence[TokenisedSample],
    task: TaskName,
    pad_id: int,
    scale: float,
) -> Tensor:
    """Backpropagate a micro-batch; returns its summed loss, without its graph."""
    total = loss_sum(backbone.model, prepare(backbone.model, part, pad_id, task), task).total
    (total * scale).backward()  # type: ignore[no-untyped-call]  # torch's
    return total.detach()
