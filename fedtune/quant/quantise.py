"""From a weight matrix to block-quantised weights with double-quantised scales.

Works through the matrix in chunks, so that beside the matrix and the result only some megabytes
are needed, and finds the nearest level by two look-ups instead of a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.kernels.packed import SUPERBLOCK, Bits, PackedWeights, padded
from fedtune.quant.codebooks import BLOCKS, CodebookName, codebooks
from fedtune.quant.packing import pack_codes
from fedtune.records import DEFAULT_BLOCK

CodebookChoice: TypeAlias = Literal["normal-float", "lloyd-max", "best"]

CHUNK = 1 << 18
"""Weights in one step; chosen so that a chunk and its temporaries stay in the last-level cache."""
CELLS = 4096
"""Cells of equal width into which -1..1 is cut to find a level; at 8 bits the closest two borders
between NormalFloat levels are ten cells apart, so no cell holds two."""
_SCALE_LEVELS = 255


def quantise(
    weight: Float[Tensor, "out in"],
    bits: Bits,
    block: int = DEFAULT_BLOCK,
    codebook: CodebookChoice = "best",
    column_weights: Float[Tensor, " in"] | None = None,
) -> PackedWeights:
    """Quantise a matrix; each code is that of the level nearest to weight / scale.

    The scale of a block is its largest magnitude, itself rounded to 8 bits between the smallest
    scale of the matrix and the largest of its superblock; codes are chosen with the rounded scale.

    Args:
        block: weights that share a scale: 32, 64 or 128.
        codebook: `best` takes the one of less squared error on this very matrix.
        column_weights: importance of each input to that error; by default all count the same.

    Raises:
        ModelError: the block size is not one of the above, or a weight is not finite.

    Source: LQ-LoRA, arXiv 2311.12023, section 3.1 (NormalFloat of any width over double-quantised
    scales). It and QLoRA (arXiv 2305.14314, section 3) choose codes with the scale before it is
    rounded.
    """
    if block not in BLOCKS:
        raise ModelError(f"a block must be one of {BLOCKS} weights, got {block}")
    flat = weight.detach().reshape(-1)
    maxima = _block_maxima(flat, block)
    if not bool(torch.isfinite(maxima).all()):
        raise ModelError(
            f"a matrix of shape {tuple(weight.shape)} holds weights that are not finite numbers; "
            "choose a base model whose weights are whole"
        )
    scale_codes, steps, offset = _quantise_scales(maxima)
    scales = (scale_codes * steps.repeat_interleave(SUPERBLOCK)[: scale_codes.numel()]).add_(offset)
    levels = codebooks(bits, block)
    if codebook != "best":
        # At 8 bits there is one codebook, whatever is asked for.
        levels = {codebook: levels[codebook]} if codebook in levels else levels
    importance = None
    if column_weights is not None:
        importance = column_weights.to(flat.device, torch.float32)
    name, codes = _choose_codes(flat, scales, bits, block, levels, importance)
    return PackedWeights(
        codes=codes,
        scale_codes=scale_codes,
        scale_steps=steps,
        scale_offset=offset,
        codebook=levels[name].to(flat.device),
        bits=bits,
        block=block,
        shape=(int(weight.shape[0]), int(weight.shape[1])),
    )


def codebook_name(packed: PackedWeights) -> CodebookName | Literal["other"]:
    """Which codebook a matrix was quantised with."""
    held = packed.codebook.cpu()
    for name, levels in codebooks(packed.bits, packed.block).items():
        if torch.equal(held, levels):
            return name
    return "other"


# ---------------------------------------------------------------- scales


def _block_maxima(flat: Tensor, block: int) -> Float32[Tensor, " blocks"]:
    """Largest magnitude of each block of the padded row; blocks of padding get the smallest."""
    maxima = torch.zeros(padded(flat.numel()) // block, device=flat.device)
    for first, values in _chunks(flat, block):
        found = values.view(-1, block).abs().amax(dim=1)
        maxima[first // block : first // block + found.numel()] = found
    filled = -(-flat.numel() // block)
    if filled:
        maxima[filled:] = maxima[:filled].amin()
    return maxima


def _quantise_scales(
    maxima: Float32[Tensor, " blocks"],
) -> tuple[UInt8[Tensor, " blocks"], Float32[Tensor, " superblocks"], Float32[Tensor, ""]]:
    """Codes, steps and offset of the scales, as `fedtune.kernels.packed` defines them."""
    if not maxima.numel():
        return maxima.to(torch.uint8), maxima, maxima.new_zeros(())
    offset = maxima.amin()
    count = maxima.numel()
    superblocks = -(-count // SUPERBLOCK)
    grouped = maxima.new_zeros(superblocks * SUPERBLOCK)
    grouped[:count] = maxima - offset
    grouped = grouped.view(superblocks, SUPERBLOCK)
    steps = grouped.amax(dim=1) / _SCALE_LEVELS
    safe = steps.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = (grouped / safe).round_().clamp_(0, _SCALE_LEVELS)
    # Beside a block a hundred times larger a scale may round to nearly nothing, and its whole
    # block with it. Such a scale is rounded up.
    lost = codes * steps[:, None] + offset < (grouped + offset) / 2
    codes += lost
    return codes.view(-1)[:count].to(torch.uint8), steps, offset


# ---------------------------------------------------------------- codes


@dataclass(frozen=True, slots=True)
class _Nearest:
    """Finds the nearest of some levels by the cell in which a number lies.

    Attributes:
        lowest: code of the level nearest to the lower end of each cell.
        border: number from which on the next code is nearer.
    """

    lowest: UInt8[Tensor, " cells"]
    border: Float32[Tensor, " cells"]

    @classmethod
    def of(cls, levels: Float32[Tensor, " levels"]) -> _Nearest:
        borders = (levels[1:] + levels[:-1]) / 2
        ends = torch.arange(CELLS + 1, dtype=torch.float64, device=levels.device)
        lowest = torch.bucketize((ends * (2 / CELLS) - 1).float(), borders)
        above = torch.cat([borders, borders.new_full((1,), torch.inf)])
        return cls(lowest.to(torch.uint8), above[lowest])

    def codes(self, x: Float32[Tensor, " n"], cells: Tensor) -> UInt8[Tensor, " n"]:
        """Codes of numbers in -1..1, whose cells are given."""
        codes = self.lowest.index_select(0, cells)
        return codes.add_(x > self.border.index_select(0, cells))


def _choose_codes(
    flat: Tensor,
    scales: Float32[Tensor, " blocks"],
    bits: Bits,
    block: int,
    levels: Mapping[CodebookName, Tensor],
    importance: Tensor | None,
) -> tuple[CodebookName, UInt8[Tensor, " bytes"]]:
    """Packed codes for the codebook of least squared error, and its name."""
    row = padded(flat.numel())
    packed = {
        name: torch.empty(row * bits // 8, dtype=torch.uint8, device=flat.device) for name in levels
    }
    on_device = {name: values.to(flat.device) for name, values in levels.items()}
    nearest = {name: _Nearest.of(values) for name, values in on_device.items()}
    errors = dict.fromkeys(levels, 0.0)
    for first, values in _chunks(flat, block):
        part = scales[first // block : (first + values.numel()) // block, None]
        # A block of zeros has scale 0 unless others lift it; it divides to zeros.
        safe = part.clamp_min(torch.finfo(torch.float32).tiny)
        x = (values.view(-1, block) / safe).clamp_(-1, 1).view(-1)
        cells = ((x + 1) * (CELLS / 2)).int()
        for name in levels:
            codes = nearest[name].codes(x, cells)
            pack_codes(codes, bits, packed[name], first)
            if len(levels) > 1:
                near = on_device[name].index_select(0, codes.int()).view(-1, block) * part
                error = near.view(-1).sub_(values)[: flat.numel() - first].square_()
                errors[name] += float(_weighted(error, first, importance).sum())
    best = min(levels, key=errors.__getitem__)
    return best, packed[best]


def _weighted(error: Tensor, first: int, importance: Tensor | None) -> Tensor:
    """Errors of consecutive weights of the row, each times the importance of its column."""
    if importance is None:
        return error
    places = torch.arange(first, first + error.numel(), device=error.device)
    return error.mul_(importance[places % importance.numel()])


def _chunks(flat: Tensor, block: int) -> Iterator[tuple[int, Float32[Tensor, " n"]]]:
    """The padded row as float32, piece by piece, each with its place in the row."""
    total = flat.numel()
    for first in range(0, padded(total), CHUNK):
        piece = flat[first : first + CHUNK].float()
        missing = padded(piece.numel()) - piece.numel()
        yield first, torch.nn.functional.pad(piece, (0, missing)) if missing else piece
