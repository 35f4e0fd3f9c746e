"""The gradient of one optimiser step: the unit that a round repeats and a benchmark times."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedtune.model.backbone import Backbone
from fedtune.model.loss import TokenisedSample, loss_sum, loss_units, prepare
from fedtune.records import TaskName
from fedtune.train.batches import micro_batches


def accumulate(
    backbone: Backbone,
    batch: Sequence[TokenisedSample],
    micro_batch: int,
    task: TaskName,
    pad_id: int,
    loss_factor: float = 1.0,
) -> float:
    """Backpropagate one optimiser step's mean loss, micro-batch by micro-batch.

    Args:
        loss_factor: multiplies the loss that is backpropagated, so that float16 gradients keep
            off zero; the optimiser divides by it.

    Returns:
        The mean loss per unit, without the factor.
    """
    device = next(backbone.model.parameters()).device
    units = loss_units(batch, task)
    # Summed where it is computed: reading it would make an accelerator wait at every micro-batch.
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for part in micro_batches(batch, micro_batch):
        total = loss_sum(backbone.model, prepare(backbone.model, part, pad_id, task), task).total
        (total * (loss_factor / units)).backward()  # type: ignore[no-untyped-call]  # torch's
        loss += total.detach()
    return float(loss) / units
