"""The one layout of block-quantised weights, which every path (torch, C, CUDA) reads alike.

A matrix (out, in) is taken as one row of out * in weights, row by row. Consecutive weights form
blocks of 32, 64 or 128, each with a scale; a block may span two rows. The row is padded to a
multiple of `GROUP` weights, so that no path needs a special case at its end.

A weight is `codebook[code] * scale`. The scale of block i is

    scale_offset + scale_codes[i] * scale_steps[i // SUPERBLOCK]

computed in float32 as a rounded product and then a rounded sum (no fused multiply-add), so that
every path gives the same bits.

Codes of 8, 4 and 2 bits lie in bytes, the first weight in the highest bits (as in bitsandbytes).
3 bits are two planes: first the low two bits of every weight, laid out as 2-bit codes, then the
high bit of every weight, eight to a byte, the first in the highest bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

Bits: TypeAlias = Literal[2, 3, 4, 8]
GROUP = 256
"""Weights to which a matrix is padded; also the grain at which a part of it can be unpacked."""
SUPERBLOCK = 256
"""Scales that share one float32 step (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A block-quantised matrix.

    Attributes:
        codes: bits / 8 bytes per weight, of the padded row.
        scale_codes: one per block of the padded row.
        scale_steps: one per SUPERBLOCK blocks.
        scale_offset: the smallest scale; one number.
        codebook: 2 ** bits values in -1..1, ascending.
        block: weights that share a scale: 32, 64 or 128.
        shape: (out, in).
    """

    codes: UInt8[Tensor, " bytes"]
    scale_codes: UInt8[Tensor, " blocks"]
    scale_steps: Float32[Tensor, " superblocks"]
    scale_offset: Float32[Tensor, ""]
    codebook: Float32[Tensor, " levels"]
    bits: Bits
    block: int
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes that the storage keeps."""
        parts = (self.codes, self.scale_codes, self.scale_steps, self.scale_offset, self.codebook)
        return sum(part.numel() * part.element_size() for part in parts)

    def to(self, device: torch.device) -> PackedWeights:
        """The same weights on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale_codes=self.scale_codes.to(device),
            scale_steps=self.scale_steps.to(device),
            scale_offset=self.scale_offset.to(device),
            codebook=self.codebook.to(device),
        )


def padded(weights: int) -> int:
    """Length of the padded row."""
    return -(-weights // GROUP) * GROUP
