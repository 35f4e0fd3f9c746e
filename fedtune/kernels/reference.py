"""What every kernel computes, in plain torch; a fast path takes the same arguments.

Arithmetic is in float32 whatever the dtype of the tensors, and results are rounded once, except
where a docstring says otherwise. Every function works on any device and differentiates nothing:
gradients are functions of their own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.kernels.packed import SUPERBLOCK, PackedWeights, padded


def dequantise(packed: PackedWeights, first: int, out: Tensor) -> Tensor:
    """Unpack weights `first`, `first` + 1, ... of the flat row into `out`.

    Args:
        first: a multiple of 256.
        out: contiguous; float32, bfloat16 or float16.

    Returns:
        `out`; every path gives the same bits.
    """
    total = padded(packed.weights)
    blocks = torch.arange(packed.scale_codes.numel(), device=out.device)
    steps = packed.scale_steps[blocks // SUPERBLOCK]
    scales = packed.scale_offset + packed.scale_codes.float() * steps
    codes = _codes(packed.codes, packed.bits, total).long()
    values = packed.codebook[codes] * scales.repeat_interleave(packed.block)[:total]
    return out.copy_(values[first : first + out.numel()].view(out.shape))


def _codes(packed: Tensor, bits: int, total: int) -> Float[Tensor, " total"]:
    if bits == 3:
        low, third = packed[: total // 4], packed[total // 4 :]
        return _codes(low, 2, total) | _codes(third, 1, total) << 2
    shifts = torch.arange(8 - bits, -1, -bits, device=packed.device, dtype=torch.uint8)
    return (packed[:, None] >> shifts & (1 << bits) - 1).view(-1)
