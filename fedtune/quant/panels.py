"""The parts of a matrix that are unpacked at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.kernels.workspace import workspace

PANEL_ROWS = 256
"""Rows of a panel on a CPU. Chosen by measurement: a panel of a 4,096-column matrix is then 4 MB,
stays in the last-level cache, and a product over panels is as fast as one over the matrix."""

Panel = tuple[int, Float[Tensor, "rows in"]]
"""The first row of a panel, and its values."""


def empty_panels(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, rows: int
) -> Iterator[Panel]:
    """Consecutive panels of a matrix to be filled: one reused workspace.

    Args:
        rows: rounded up to a multiple of 256, so that a panel starts where a group of packed
            weights does. On an accelerator there is one panel: launches cost more than memory.
    """
    height, width = shape
    step = -(-rows // PANEL_ROWS) * PANEL_ROWS if device.type == "cpu" else max(height, 1)
    for first in range(0, height, step):
        count = min(step, height - first)
        yield first, workspace(count * width, dtype, device).view(count, width)
