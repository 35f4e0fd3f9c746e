"""Unpack block-quantised weights with torch alone, fast: bit for bit `reference.dequantise`.

The codes of two or four neighbouring weights are one index into a table of all their values
(bitwise: a pair of float32 is one float64, four are one complex128), so that a gather moves 8 or
16 bytes, and no code is shifted or masked one by one. Nothing needs to be compiled.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fedtune.kernels.packed import GROUP, SUPERBLOCK, PackedWeights
from fedtune.kernels.workspace import workspace

CHUNK = 1 << 19
"""Weights unpacked at a time; a multiple of GROUP. Chosen by measurement: a quarter of it spends
more on calls, and twice as much gains a few hundredths for twice the scratch memory."""

_PER_INDEX = {2: 4, 3: 4, 4: 2, 8: 2}
_WIDE = {2: torch.float64, 4: torch.complex128}


def dequantise(packed: PackedWeights, first: int, out: Tensor) -> Tensor:
    """Write weights `first`, `first + 1`, ... of the flat row into `out`.

    Every value is codebook * scale in float32, rounded once more if `out` is narrower.

    Args:
        first: a multiple of GROUP.
        out: contiguous; float32, bfloat16 or float16; at most as many numbers as the padded row
            has from `first` on.

    Returns:
        `out`.
    """
    assert first % GROUP == 0, f"a part must start at a multiple of {GROUP}, not at {first}"
    flat, total = out.view(-1), out.numel()
    scales = _scales(packed, first, total)
    table = _table(packed)
    for start in range(0, total, CHUNK):
        part = flat[start : start + CHUNK]
        begin = start // packed.block
        length = -(-part.numel() // packed.block) * packed.block
        chunk_scales = scales[begin : begin + length // packed.block]
        if part.dtype == torch.float32 and length == part.numel() and _aligned(part):
            _unpack(packed, table, first + start, chunk_scales, part)
        else:
            values = workspace(length, torch.float32, out.device, "values")
            _unpack(packed, table, first + start, chunk_scales, values)
            part.copy_(values[: part.numel()])
    return out


def _scales(packed: PackedWeights, first: int, weights: int) -> Tensor:
    """Float32 scales of the blocks that hold these weights."""
    begin, end = first // packed.block, -(-(first + weights) // packed.block)
    low, high = begin // SUPERBLOCK, -(-end // SUPERBLOCK)
    steps = packed.scale_steps[low:high].repeat_interleave(SUPERBLOCK)
    steps = steps[begin - low * SUPERBLOCK : end - low * SUPERBLOCK]
    # A product, then a sum: both are rounded, as the layout demands.
    return (packed.scale_codes[begin:end] * steps).add_(packed.scale_offset)


def _unpack(packed: PackedWeights, table: Tensor, first: int, scales: Tensor, out: Tensor) -> None:
    """Fill `out`, float32 and whole blocks."""
    weights, per_index = out.numel(), _PER_INDEX[packed.bits]
    indices = workspace(weights // per_index, torch.int32, out.device, "indices")
    if packed.bits == 3:
        low_plane = packed.codes[first // 4 : (first + weights) // 4]
        start = packed.scale_codes.numel() * packed.block // 4
        high_plane = packed.codes[start + first // 8 : start + (first + weights) // 8]
        # One byte of the high plane belongs to two bytes of the low one, so to two indices.
        both = workspace(weights // 8, torch.int32, out.device, "halves").copy_(high_plane)
        torch.index_select(_high_halves(out.device), 0, both, out=indices.view(torch.int64))
        indices.add_(low_plane)
    else:
        begin, end = first * packed.bits // 8, (first + weights) * packed.bits // 8
        codes = packed.codes[begin:end]
        if packed.bits == 8:
            # Codes that are mapped from a file may begin at an odd byte.
            even = codes if codes.storage_offset() % 2 == 0 else codes.clone()
            codes = even.view(torch.uint16)
        indices.copy_(codes)
    torch.index_select(table, 0, indices, out=out.view(_WIDE[per_index]))
    out.view(-1, packed.block).mul_(scales[:, None])


def _aligned(part: Tensor) -> bool:
    """Whether four float32 from its start on can be seen as one complex128."""
    return part.storage_offset() % 4 == 0 and part.data_ptr() % 16 == 0


def _table(packed: PackedWeights) -> Tensor:
    """Values of all codes that one index can hold, in the codebook's units."""
    if packed.codebook.device.type == "cpu":
        return _cached_table(packed.bits, tuple(packed.codebook.tolist()))
    return _make_table(packed.bits, packed.codebook)


@lru_cache(maxsize=64)
def _cached_table(bits: int, codebook: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):
        return _make_table(bits, torch.tensor(codebook, dtype=torch.float32))


@lru_cache(maxsize=8)
def _high_halves(device: torch.device) -> Tensor:
    """For each byte its high and its low four bits, each shifted up by 8, as one int64."""
    with torch.inference_mode(False):
        byte = torch.arange(256, dtype=torch.int32, device=device)
        halves = torch.stack([(byte >> 4) << 8, (byte & 15) << 8], dim=1)
        return halves.contiguous().view(torch.int64).view(-1)


def _make_table(bits: int, codebook: Tensor) -> Tensor:
    per_index = _PER_INDEX[bits]
    index = torch.arange(2 ** (bits * per_index), device=codebook.device)[:, None]
    place = torch.arange(per_index - 1, -1, -1, device=codebook.device)  # the first is highest
    if bits == 3:
        codes = ((index >> 2 * place) & 3) | (((index >> (8 + place)) & 1) << 2)
    elif bits == 8:
        codes = (index >> bits * place.flip(0)) & 255  # two bytes read as one little-endian number
    else:
        codes = (index >> bits * place) & (2**bits - 1)
    return codebook[codes].contiguous().view(_WIDE[per_index]).view(-1)
