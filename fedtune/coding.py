"""The forms in which tensors travel, and the bytes that each takes.

Three forms hold every number on its own: float32, float16 and bfloat16. The others hold codes of a
few bits in blocks of up to 64 numbers, and one bfloat16 scale per block. A block lies along the
longer side of a matrix: along the inputs of A and along the outputs of B. So each direction of an
adapter has scales of its own.

In `q4`, `q3` and `q2` a direction may also have bits of its own, 0 to 8, where those of a message
come to 4, 3 or 2 in the mean (`fedtune.wire.allotment`). A direction of 0 bits has no scale either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

CodecName: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "q4", "q3", "q2"]
CODECS: tuple[CodecName, ...] = get_args(CodecName)

BITS: Mapping[CodecName, int] = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "int8": 8,
    "q4": 4,
    "q3": 3,
    "q2": 2,
}
"""Bits of one number, or of its code."""
BLOCK_CODECS: tuple[CodecName, ...] = ("int8", "q4", "q3", "q2")
ALLOTTED_CODECS: tuple[CodecName, ...] = ("q4", "q3", "q2")
"""Those in which directions may have bits of their own."""
MOST_BITS = 8

BLOCK = 64
"""Most numbers that share a scale; the block of QLoRA (arXiv 2305.14314)."""
SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a tensor is cut: `rows` times `count` blocks of `length` numbers.

    Blocks of a row are of one length, so that the last one is filled up by less than `count`
    numbers: 172 numbers make three blocks of 58, where blocks of 64 would waste 20.
    """

    rows: int
    count: int
    length: int


def block_axis(shape: tuple[int, ...]) -> int:
    """The axis that blocks lie along: the longest, and the first of several."""
    return max(range(len(shape)), key=lambda axis: (shape[axis], -axis)) if shape else 0


def blocks_of(shape: tuple[int, ...]) -> Blocks:
    """How a tensor of this shape is cut."""
    size = math.prod(shape)
    if size == 0:
        return Blocks(0, 0, 0)
    along = shape[block_axis(shape)] if shape else 1
    count = -(-along // BLOCK)
    return Blocks(size // along, count, -(-along // count))


def coded_bytes(codec: CodecName, shape: tuple[int, ...], bits: Sequence[int] | None = None) -> int:
    """Bytes of a tensor of this shape.

    Args:
        bits: of each direction; None: as many as the codec says.
    """
    if codec not in BLOCK_CODECS:
        return math.prod(shape) * BITS[codec] // 8
    cut = blocks_of(shape)
    rows = {BITS[codec]: cut.rows} if bits is None else Counter(bits)
    return sum(_group_bytes(cut, width, count) for width, count in rows.items() if width)


def _group_bytes(cut: Blocks, width: int, rows: int) -> int:
    """Scales and codes of all rows of one width; their last byte is filled up."""
    numbers = rows * cut.count * cut.length
    return SCALE_BYTES * rows * cut.count + -(-numbers * width // 8)
