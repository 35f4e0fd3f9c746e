"""Codes of 2, 3, 4 or 8 bits into bytes, in the layout of `fedtune.kernels.packed`."""

from __future__ import annotations

from jaxtyping import UInt8
from torch import Tensor

from fedtune.kernels.packed import Bits


def pack_codes(
    codes: UInt8[Tensor, " n"], bits: Bits, out: UInt8[Tensor, " bytes"], first: int = 0
) -> None:
    """Write one code per byte as `bits` per code into the bytes of a whole row.

    Args:
        codes: each below 2 ** bits; their number is a multiple of 8.
        out: all bytes of the padded row; for 3 bits the low plane and behind it the high one.
        first: place of the first code in the row, a multiple of 8.
    """
    n = codes.numel()
    if bits == 3:
        high_plane = out.numel() * 2 // 3
        _join(codes & 3, 2, out[first // 4 : (first + n) // 4])
        _join(codes >> 2, 1, out[high_plane + first // 8 : high_plane + (first + n) // 8])
    else:
        _join(codes, bits, out[first * bits // 8 : (first + n) * bits // 8])


def _join(codes: Tensor, bits: int, out: Tensor) -> None:
    """Several codes to a byte, the first in the highest bits."""
    per_byte = 8 // bits
    grouped = codes.view(-1, per_byte)
    out.copy_(grouped[:, 0])
    for place in range(1, per_byte):
        out.bitwise_left_shift_(bits).bitwise_or_(grouped[:, place])
