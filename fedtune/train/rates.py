"""Learning rates that differ between blocks and between rows: only the optimiser knows of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedtune.model.shapes import block_of


def layer_shares(matrices: Collection[str], decay: float) -> dict[str, float]:
    """Share of the learning rate of each matrix's factors: `decay ** (blocks above its own)`.

    Blocks are counted over all adapted matrices of the backbone, so that devices that train
    different matrices move the same one at the same rate. A task head keeps the whole rate.

    Args:
        decay: factor from a block to the one below it; 1 for equal rates.

    Source:
        Howard & Ruder, arXiv 1801.06146, section 3.2 (discriminative fine-tuning).
    """
    if decay == 1.0 or not matrices:
        return {}
    blocks = {name: block_of(name) for name in matrices}
    top = max(blocks.values())
    shares = {name: decay ** (top - block) for name, block in blocks.items()}
    return {f"{name}.{side}": share for name, share in shares.items() for side in "ab"}


class RowRates:
    """ALLoRA's learning rate: row i of B moves by its step over the root of |B_i| + 1/eta^2.

    A row that is zero moves eta times as far as without, and the longer a row grows the slower it
    moves. Neither dropout nor a scale belongs to it: leave the scale at 1.

    Args:
        parameters: name -> what is trained; of these `<matrix>.b` (out, rank).
        eta: factor of a row that is zero.

    Source:
        ALLoRA, arXiv 2410.09692. There the factor multiplies the gradient. AdamW divides a gradient
        by its own size, which would take a factor of it out again, so here it multiplies the step;
        under plain SGD the two are one. The norm of a row of the update itself, B A, is that of the
        row of B wherever the rows of A are orthonormal, as a device is sent them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], eta: float) -> None:
        self._b = [
            parameter
            for name, parameter in parameters.items()
            if name.endswith(".b") and not name.startswith("dense.")
        ]
        self._floor = 1.0 / eta**2

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """One step of the optimiser, then every row of B put where its own rate takes it."""
        before = [b.clone() for b in self._b]
        optimizer.step()
        for b, old in zip(self._b, before, strict=True):
            rates = (old.norm(dim=1, keepdim=True) + self._floor).rsqrt()  # (out, 1)
            torch.lerp(old, b, rates, out=b)
