"""The levels that a weight can take, in units of its block's scale.

Two families. NormalFloat spaces its levels by quantiles of a Gaussian and has a level at 0 and at
both ends. Lloyd-Max has the least squared error on Gaussian weights: 2.7, 1.3 and 1.1 times less
than NormalFloat at 2, 3 and 4 bits (blocks of 64), for the same bytes. NormalFloat is the better
one where many weights are 0 or where the largest of a block stands far out.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float32
from torch import Tensor

from fedtune.kernels.packed import Bits

CodebookName: TypeAlias = Literal["normal-float", "lloyd-max"]

BLOCKS = (32, 64, 128)
"""Weights that may share a scale."""

_OFFSET = 0.9677083
"""Quantile of the outermost level: (1 - 1/32 + 1 - 1/30) / 2, as bitsandbytes has it, for all
widths (LQ-LoRA, arXiv 2311.12023, section 3.1, extends NF4 so to NF3 and NF2)."""

# From `lloyd_max_levels(bits, block)`; a test derives them again.
_LLOYD_MAX: dict[tuple[int, int], tuple[float, ...]] = {
    (2, 32): (0.1902566, 0.6515484),
    (2, 64): (0.1730389, 0.5885976),
    (2, 128): (0.1592518, 0.5390840),
    (3, 32): (0.0989757, 0.3065442, 0.5491124, 0.8848351),
    (3, 64): (0.0923077, 0.2858867, 0.5125298, 0.8310763),
    (3, 128): (0.0859759, 0.2661566, 0.4768845, 0.7743557),
    (4, 32): (
        0.0485309, 0.1466812, 0.2482379, 0.3559895, 0.4737077, 0.6071271, 0.7661882, 0.9714145,
    ),
    (4, 64): (
        0.0461633, 0.1395652, 0.2363468, 0.3393354, 0.4524802, 0.5820776, 0.7398544, 0.9532123,
    ),
    (4, 128): (
        0.0438012, 0.1324471, 0.2243834, 0.3224045, 0.4305035, 0.5552663, 0.7096351, 0.9270549,
    ),
}  # fmt: skip
"""Positive half of each codebook, by bits and block. None at 8 bits, where it would lower the
squared error by 3 to 13 in a hundred, of an error that is a hundredth of that at 4 bits."""


@lru_cache(maxsize=16)
def normal_float(bits: Bits) -> Float32[Tensor, " levels"]:
    """Levels of k-bit NormalFloat, ascending from -1 to 1 with one at 0.

    Half of the codes, one fewer on the negative side, are quantiles of the normal distribution at
    equal steps of probability, divided by the largest.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314, appendix E; equal to bitsandbytes' NF4 to
    1e-6.
    """
    half = 2 ** (bits - 1)
    step = _OFFSET - 0.5
    below = [1 - _OFFSET + step * i / (half - 1) for i in range(half - 1)]
    above = [0.5 + step * i / half for i in range(half + 1)]
    values = [NormalDist().inv_cdf(p) for p in (*below, *above)]
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64).div_(values[-1]).float()


@lru_cache(maxsize=16)
def lloyd_max(bits: Bits, block: int) -> Float32[Tensor, " levels"]:
    """Levels of least squared error for Gaussian weights in blocks of `block`, ascending."""
    positive = _LLOYD_MAX[bits, block]
    with torch.inference_mode(False):
        return torch.tensor([*(-level for level in reversed(positive)), *positive])


def codebooks(bits: Bits, block: int) -> dict[CodebookName, Float32[Tensor, " levels"]]:
    """The codebooks that exist for a width, by name; the tensors are shared, never write to one."""
    found: dict[CodebookName, Tensor] = {"normal-float": normal_float(bits)}
    if (bits, block) in _LLOYD_MAX:
        found["lloyd-max"] = lloyd_max(bits, block)
    return found
