"""The inputs of a device's layers on one batch: what data-driven choices look at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import torch
from torch import Tensor

from fedtune.model.backbone import Backbone
from fedtune.model.loss import TokenisedSample, loss_sum, prepare
from fedtune.records import TaskName
from fedtune.train.batches import micro_batches

_ROWS: Final = 512
"""Tokens that are kept of a layer. Chosen: several times a rank, and 8 MB for 4096 inputs."""


@torch.no_grad()
def layer_inputs(
    backbone: Backbone,
    names: Collection[str],
    batch: Sequence[TokenisedSample],
    micro_batch: int,
    task: TaskName,
    pad_id: int,
) -> dict[str, Tensor]:
    """Matrix name -> inputs (tokens, in) in float32, of at most 512 tokens.

    One forward pass over the batch, with the factors that are attached. Every micro-batch gives
    its share, evenly spaced over its tokens; padding gives none.
    """
    # Before anyone looks: a model that is new is first tried on samples of its own.
    parts = [prepare(backbone.model, p, pad_id, task) for p in micro_batches(batch, micro_batch)]
    most = max(1, _ROWS // len(parts))
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    present: Tensor | None = None

    def keep(name: str, rows: Tensor) -> None:
        if present is not None and present.numel() == rows.shape[0]:
            rows = rows[present.flatten()]
        stride = max(1, -(-rows.shape[0] // most))
        kept[name].append(rows[::stride].float())

    for name in names:
        backbone.layers[name].observe = lambda rows, name=name: keep(name, rows)
    try:
        for part in parts:
            present = part.present
            loss_sum(backbone.model, part, task)
    finally:
        for name in names:
            backbone.layers[name].observe = None
    return {name: torch.cat(rows) for name, rows in kept.items()}
