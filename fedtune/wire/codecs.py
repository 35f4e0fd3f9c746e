"""Between arrays and the bytes in which they travel; numpy only.

In a block form a number is `level[code] * scale`. The levels of 2, 3 and 4 bits are those of least
squared error for Gaussian numbers in blocks of 64 that are divided by their largest; those of other
widths are even. The scale starts at the block's largest number, and is then fitted to the codes.
Blocks of zeros come out as zeros. Encoding chooses and may change; decoding is one product in
float32, which gives the same bits on every machine.

Rows of one width lie together, narrow ones first: their scales, then their codes.

Source: Lloyd (1982), "Least squares quantization in PCM"; block scales as in QLoRA (arXiv
    2305.14314, section 3), which takes other levels, and scales that are not fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from mmap import mmap
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from fedtune.coding import (
    BITS,
    BLOCK_CODECS,
    SCALE_BYTES,
    Blocks,
    CodecName,
    block_axis,
    blocks_of,
)
from fedtune.errors import ProtocolError
from fedtune.records import FloatArray

Packed: TypeAlias = bytes | mmap
"""A block of packed tensors, in memory or as a file that is mapped in."""


def _both_signs(positive: tuple[float, ...]) -> NDArray[np.float32]:
    half = np.array(positive, np.float32)
    return np.concatenate([-half[::-1], half])


def _even(bits: int) -> NDArray[np.float32]:
    steps = 2**bits - 1
    return np.asarray((2 * np.arange(steps + 1) - steps) / steps, np.float32)


_LEVELS: Mapping[int, NDArray[np.float32]] = {
    **{bits: _even(bits) for bits in (1, 5, 6, 7, 8)},
    2: _both_signs((0.1782, 0.6019)),
    3: _both_signs((0.0945, 0.2921, 0.5206, 0.8330)),
    4: _both_signs((0.0476, 0.1437, 0.2428, 0.3478, 0.4623, 0.5924, 0.7479, 0.9513)),
}
"""Bits -> code -> level. Lloyd's iteration on 4 million numbers, which leaves 33.7 %, 17.4 % and
8.6 % of a Gaussian matrix's norm as error before scales are fitted."""
_PARTS = 1 << 14
_NEAREST = {
    bits: np.searchsorted(
        (levels[1:] + levels[:-1]) / 2, (np.arange(_PARTS + 1) + 0.5) / (_PARTS // 2) - 1
    ).astype(np.uint8)
    for bits, levels in _LEVELS.items()
}
"""Bits -> part of -1..1 that a number lies in -> code of its level. A search takes four times as
long; next to the middle between two levels the farther one may be taken, by less than a part."""
_LARGEST = np.uint16(0x7F7F)
"""Of the finite bfloat16 numbers, by its bits; a scale that rounds up beyond it takes it."""


def encode(
    array: FloatArray, codec: CodecName, name: str = "array", bits: Sequence[int] | None = None
) -> bytes:
    """The bytes of a tensor; `coded_bytes` of them.

    Args:
        name: of the tensor, for the message.
        bits: of each direction; None: as many as the codec says.

    Raises:
        ProtocolError: a value is not finite, or does not fit the form.
    """
    values = np.ascontiguousarray(array, dtype=np.float32)
    if codec in BLOCK_CODECS:
        _check_finite(values, array, codec, name)
        return _encode_blocks(values, codec, bits)
    with np.errstate(over="ignore"):
        if codec == "bf16":
            rounded = _to_bf16(values)
            _check_finite(_from_bf16(rounded), array, codec, name)
            return rounded.astype("<u2").tobytes()
        plain = values.astype("<f2" if codec == "fp16" else "<f4")
    _check_finite(plain, array, codec, name)
    return plain.tobytes()


def decode(
    data: Packed,
    offset: int,
    codec: CodecName,
    shape: tuple[int, ...],
    name: str = "array",
    bits: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """A tensor that lies at `offset` in a block of bytes, in memory of its own.

    The bytes must hold `coded_bytes` from there on.

    Raises:
        ProtocolError: a value or a scale is not finite.
    """
    if codec in BLOCK_CODECS:
        values = _decode_blocks(data, offset, codec, shape, name, bits)
    elif codec == "bf16":
        values = _from_bf16(_numbers(data, "<u2", math.prod(shape), offset)).reshape(shape)
    else:
        dtype = "<f2" if codec == "fp16" else "<f4"
        values = _numbers(data, dtype, math.prod(shape), offset).astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise ProtocolError(f"tensor {name}: expected finite values, got nan or inf")
    return values


def rounded(
    array: FloatArray, codec: CodecName, bits: Sequence[int] | None = None
) -> NDArray[np.float32]:
    """The values that the other side holds after a tensor has travelled.

    Raises:
        ProtocolError: as for `encode`.
    """
    return decode(encode(array, codec, bits=bits), 0, codec, array.shape, bits=bits)


def _numbers(data: Packed, dtype: str, count: int, offset: int) -> NDArray[np.generic]:
    return np.frombuffer(data, np.dtype(dtype), count, offset=offset)


def _check_finite(values: FloatArray, array: FloatArray, codec: CodecName, name: str) -> None:
    if not np.isfinite(values).all():
        largest = float(np.abs(array).max())
        raise ProtocolError(
            f"{name}: expected finite {codec} values, the largest is {largest:g}; lower "
            "train.learning_rate, or set wire.down and wire.up to fp32 if it is finite"
        )


# ---------------------------------------------------------------- bfloat16


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # Rounding a nan by its bits could make it an infinity or a number.
    upper = np.where(np.isnan(values), np.uint32(0x7FC0), nearest)
    return upper.astype(np.uint16)


def _from_bf16(upper: NDArray[np.generic]) -> NDArray[np.float32]:
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


# ---------------------------------------------------------------- blocks


def _encode_blocks(
    values: NDArray[np.float32], codec: CodecName, bits: Sequence[int] | None
) -> bytes:
    cut = blocks_of(values.shape)
    if cut.rows == 0:
        return b""
    lines = np.moveaxis(np.atleast_1d(values), block_axis(values.shape), -1)
    lines = lines.reshape(cut.rows, -1)
    parts = []
    for width, rows in _groups(cut, codec, bits):
        blocks = _cut(lines[rows], cut)
        scales = _from_bf16(_scales(np.abs(blocks).max(axis=1)))
        levels = _LEVELS[width][_codes(blocks, scales, width)]
        # Least squares: what the codes say, at the size that comes closest to the block.
        square = np.einsum("ij,ij->i", levels, levels, dtype=np.float64)
        fitted = np.einsum("ij,ij->i", levels, blocks, dtype=np.float64) / np.maximum(square, 1e-30)
        upper = _scales(fitted)
        codes = _codes(blocks, _from_bf16(upper), width)
        parts += [upper.astype("<u2").tobytes(), _pack_bits(codes, width)]
    return b"".join(parts)


def _decode_blocks(
    data: Packed,
    offset: int,
    codec: CodecName,
    shape: tuple[int, ...],
    name: str,
    bits: Sequence[int] | None,
) -> NDArray[np.float32]:
    cut = blocks_of(shape)
    if cut.rows == 0:
        return np.zeros(shape, np.float32)
    along = shape[block_axis(shape)] if shape else 1
    lines = np.zeros((cut.rows, along), np.float32)
    for width, rows in _groups(cut, codec, bits):
        total = len(rows) * cut.count
        scales = _from_bf16(_numbers(data, "<u2", total, offset))
        if not np.isfinite(scales).all():
            raise ProtocolError(f"tensor {name}: expected finite scales, got nan or inf")
        offset += SCALE_BYTES * total
        numbers = total * cut.length
        packed = np.frombuffer(data, np.uint8, -(-numbers * width // 8), offset=offset)
        offset += len(packed)
        levels = _LEVELS[width][_unpack_bits(packed, width, numbers)]
        with np.errstate(over="ignore"):
            blocks = levels.reshape(total, cut.length) * scales[:, None]
        lines[rows] = blocks.reshape(len(rows), cut.count * cut.length)[:, :along]
    return _unfolded(lines, shape)


def _scales(sizes: Float[np.ndarray, " blocks"]) -> NDArray[np.uint16]:
    """Sizes of blocks as bfloat16, none of which is negative or infinite."""
    with np.errstate(over="ignore"):
        narrow = np.maximum(sizes, 0.0).astype(np.float32)
    return np.minimum(_to_bf16(narrow), _LARGEST)


def _groups(
    cut: Blocks, codec: CodecName, bits: Sequence[int] | None
) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Widths above 0, rising, each with the rows that have it."""
    widths = np.full(cut.rows, BITS[codec]) if bits is None else np.asarray(bits)
    for width in np.unique(widths[widths > 0]):
        yield int(width), np.flatnonzero(widths == width)


def _cut(lines: Float[np.ndarray, "rows along"], cut: Blocks) -> Float[np.ndarray, "blocks length"]:
    """The blocks of some rows; the last of each row is filled up with zeros."""
    filled = np.zeros((len(lines), cut.count * cut.length), np.float32)
    filled[:, : lines.shape[1]] = lines
    return filled.reshape(len(lines) * cut.count, cut.length)


def _unfolded(
    lines: Float[np.ndarray, "rows along"], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """A tensor out of its rows along the blocks' axis."""
    if not shape:
        return lines.reshape(shape)
    axis = block_axis(shape)
    rest = shape[:axis] + shape[axis + 1 :]
    return np.ascontiguousarray(np.moveaxis(lines.reshape(*rest, shape[axis]), -1, axis))


def _codes(
    blocks: Float[np.ndarray, "blocks length"], scales: NDArray[np.float32], width: int
) -> UInt8[np.ndarray, "blocks length"]:
    """The nearest level of each number; in blocks without a scale any, since all mean zero."""
    known = np.where(scales > 0, scales, np.float32(1))
    with np.errstate(over="ignore"):
        relative = np.clip(blocks / known[:, None], -1, 1)
    return _NEAREST[width][((relative + 1) * (_PARTS // 2)).astype(np.int16)]


def _pack_bits(codes: UInt8[np.ndarray, "blocks length"], bits: int) -> bytes:
    """Codes one after another, the lowest bit first; the last byte is filled up with zeros."""
    if bits == 8:
        return codes.tobytes()
    flat = codes.reshape(-1, 1)
    return np.packbits(flat >> np.arange(bits, dtype=np.uint8) & 1, bitorder="little").tobytes()


def _unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    single = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    weights = (1 << np.arange(bits, dtype=np.uint8)).astype(np.uint8)
    return np.asarray(single @ weights, dtype=np.uint8)
