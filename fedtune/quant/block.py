"""Matrices of 2, 3, 4 or 8 bits per weight, in blocks that share a scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.kernels.dispatch import dequantise
from fedtune.kernels.packed import Bits, PackedWeights
from fedtune.quant.codebooks import codebooks
from fedtune.quant.panels import PANEL_ROWS, Panel, empty_panels
from fedtune.quant.quantise import CodebookChoice, codebook_name, quantise
from fedtune.records import DEFAULT_BLOCK, FormatName, MatrixForm

BLOCK_FORMATS: dict[FormatName, tuple[Bits, CodebookChoice]] = {
    "q8": (8, "best"),
    "q4": (4, "best"),
    "nf4": (4, "normal-float"),
    "q3": (3, "best"),
    "q2": (2, "best"),
}
"""Format -> bits per weight, and which codebook."""
_PARTS = ("codes", "scale_codes", "scale_steps", "scale_offset", "codebook")


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """A block-quantised matrix: `nf4` is QLoRA's format, the others may use Lloyd-Max levels."""

    format: FormatName
    packed: PackedWeights

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales; the codebook is one for all matrices of a process."""
        return self.packed.bytes - 4 * self.packed.codebook.numel()

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return dequantise(self.packed, 0, torch.empty(self.shape, dtype=dtype, device=self._device))

    def panels(self, dtype: torch.dtype, rows: int = PANEL_ROWS) -> Iterator[Panel]:
        for first, panel in empty_panels(self.shape, dtype, self._device, rows):
            yield first, dequantise(self.packed, first * self.shape[1], panel)

    def to(self, device: torch.device) -> BlockMatrix:
        return BlockMatrix(self.format, self.packed.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.packed, name) for name in _PARTS}

    def metadata(self) -> dict[str, str]:
        """Bits and block, which `restore` needs, and the codebook's name for a reader."""
        return {
            "bits": str(self.packed.bits),
            "block": str(self.packed.block),
            "codebook": codebook_name(self.packed),
        }

    @property
    def _device(self) -> torch.device:
        return self.packed.codes.device


def store_block(
    weight: Float[Tensor, "out in"], form: MatrixForm, column_weights: Tensor | None = None
) -> BlockMatrix:
    """Quantise a matrix to a block format.

    Raises:
        ModelError: the block size is not known, or a weight is not finite.
    """
    bits, choice = BLOCK_FORMATS[form.format]
    block = form.block_size or DEFAULT_BLOCK
    return BlockMatrix(form.format, quantise(weight, bits, block, choice, column_weights))


def restore_block(
    format_name: FormatName,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> BlockMatrix:
    """The matrix whose `tensors()` and `metadata()` these are."""
    bits, block = cast(Bits, int(metadata["bits"])), int(metadata["block"])
    parts = {name: tensors[name] for name in _PARTS}
    for levels in codebooks(bits, block).values():
        if torch.equal(parts["codebook"], levels):
            parts["codebook"] = levels
    return BlockMatrix(format_name, PackedWeights(**parts, bits=bits, block=block, shape=shape))
