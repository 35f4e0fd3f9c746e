"""What each function of the facade means as launches of compiled kernels.

Same signatures as `reference`, after a launcher. Everything that a GPU would read wrongly, such as
another shape, dtype or device than a kernel expects, is refused here, before its address is taken.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels.driver import Launcher
from fedtune.kernels.packed import GROUP, PackedWeights, padded

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MOST_TEAMS = 2**31 - 1
"""Blocks that one launch may have; bodies take the rest in turns."""

_DEQUANTISE = Struct("@PPPPPPqqqii")
_DEQUANTISE_STEPS = 4  # of 16 bytes of output for each thread, as in dequantise.h


def dequantise(launcher: Launcher, packed: PackedWeights, first: int, out: Tensor) -> Tensor:
    count = out.numel()
    suffix = _suffix(out, "out")
    if first % GROUP or not 0 <= first <= first + count <= padded(packed.weights):
        raise KernelError(
            f"weights {first} to {first + count} cannot be unpacked: the first must be a multiple "
            f"of {GROUP}, and the matrix has {packed.weights}"
        )
    if not out.is_contiguous():
        raise KernelError(f"out must be contiguous, got strides {out.stride()}")
    _require_one_device(out, packed.codes, packed.scale_codes, packed.scale_steps, packed.codebook)
    if count == 0:
        return out
    codes = _at_multiple_of(packed.codes, 8)
    third_bits = packed.codes.numel() // 3 * 2 if packed.bits == 3 else 0
    tile = 256 * (16 // out.element_size()) * _DEQUANTISE_STEPS
    teams = -(-count // tile)
    if packed.bits == 8:  # 32 KB of codebook for each team: few teams, with more to do
        teams = min(teams, 6 * launcher.processors)
    launcher.launch(
        f"dequantise_{packed.bits}_{suffix}",
        min(teams, MOST_TEAMS),
        256,
        _DEQUANTISE,
        codes.data_ptr(),
        packed.scale_codes.data_ptr(),
        packed.scale_steps.data_ptr(),
        packed.scale_offset.data_ptr(),
        packed.codebook.data_ptr(),
        out.data_ptr(),
        third_bits,
        first,
        count,
        packed.block.bit_length() - 1,
        out.data_ptr() % 16 == 0,
    )
    return out


def _suffix(tensor: Tensor, name: str) -> str:
    try:
        return SUFFIX[tensor.dtype]
    except KeyError:
        raise KernelError(
            f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}"
        ) from None


def _require_one_device(*tensors: Tensor) -> None:
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise KernelError(f"tensors must be on one device, got {device} and {tensor.device}")


def _at_multiple_of(tensor: Tensor, size: int) -> Tensor:
    """The tensor, or a copy if it starts where wide loads cannot."""
    return tensor if tensor.data_ptr() % size == 0 else tensor.clone()
