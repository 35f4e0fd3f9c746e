"""Products of few tokens with packed weights, which are unpacked on their way and never stored.

Unpacking a whole matrix reads about half a byte and writes two for every weight, and the product
reads the two again. With few tokens this traffic is all there is, and a kernel that keeps weights
in registers has a ninth of it; with many tokens the multiplication is the cost, and nothing is
faster than cuBLAS on an unpacked panel (a perfect fused kernel wins at most 2.8x at 128 tokens,
1.45x at 512, 1.11x at 2048, computed from traffic and operations). bitsandbytes
draws its line on sm_90 at 16 to 64 tokens.

There is no transposed product g W for the backward pass. Its operands pair weights of different
rows, which lie apart in the packed codes, and training steps are beyond the line: they unpack.
"""

from __future__ import annotations

from struct import Struct

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels import unpack
from fedtune.kernels.driver import Launcher
from fedtune.kernels.launches import MOST_TEAMS, SUFFIX
from fedtune.kernels.packed import GROUP, PackedWeights

MOST_TOKENS = 32
"""Two tiles of tensor cores. Each tile more reads x once more in every block of 32 rows, while the
unpacked route's cost does not yet grow. On an H200, 4 bits and bfloat16, a matrix of 4096 x 14336
takes 43 us for 1 token and 45 us for 32, half of what unpacking it and multiplying takes;
bitsandbytes' NF4 takes 31 us for 1 token and 102 us for 32."""

_PRODUCT = Struct("@PPPPPPPqqqqi")
_ROWS = 32  # of a block, as in packed_product.h


def packed_product(
    x: Float[Tensor, "tokens in"], packed: PackedWeights
) -> Float[Tensor, "tokens out"]:
    """x W^T: weights rounded to the dtype of x, float32 sums, the result rounded once."""
    dense = torch.empty(packed.shape, dtype=x.dtype, device=x.device)
    return x @ unpack.dequantise(packed, 0, dense).t()


def launchable(tokens: int, packed: PackedWeights, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel can do this product.

    It needs tensor cores for the dtype (bfloat16: from sm_80 on) and rows of whole groups of
    weights. Where it can, up to MOST_TOKENS tokens, it is the faster way.
    """
    if tokens > MOST_TOKENS or packed.shape[1] % GROUP:
        return False
    device = packed.codes.device
    if dtype == torch.bfloat16 and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype in (torch.bfloat16, torch.float16)


def launch_packed_product(launcher: Launcher, x: Tensor, packed: PackedWeights) -> Tensor:
    """`packed_product` in one launch.

    Raises:
        KernelError: too many tokens, another dtype, rows that are not whole groups of weights, or
            x of another shape, stride or device.
    """
    tokens, columns = x.shape
    out, expected = packed.shape
    if columns != expected or not x.is_contiguous() or x.device != packed.codes.device:
        raise KernelError(
            f"x must be contiguous (tokens, {expected}) on {packed.codes.device}, got "
            f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )
    if not launchable(tokens, packed, x.dtype):
        raise KernelError(
            f"a packed product takes bfloat16 (from sm_80 on) or float16, {MOST_TOKENS} tokens at "
            f"most and rows of "
            f"a multiple of {GROUP} weights, got {x.dtype}, {tokens} and {columns}"
        )
    y = x.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_()
    x, codes = _at_multiple_of_16(x), _at_multiple_of_16(packed.codes)
    launcher.launch(
        f"packed_product_{packed.bits}_{-(-tokens // 16)}_{SUFFIX[x.dtype]}",
        min(-(-out // _ROWS), MOST_TEAMS),
        256,
        _PRODUCT,
        y.data_ptr(),
        x.data_ptr(),
        codes.data_ptr(),
        packed.scale_codes.data_ptr(),
        packed.scale_steps.data_ptr(),
        packed.scale_offset.data_ptr(),
        packed.codebook.data_ptr(),
        packed.codes.numel() // 3 * 2 if packed.bits == 3 else 0,
        tokens,
        columns,
        out,
        packed.block.bit_length() - 1,
    )
    return y


def _at_multiple_of_16(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it starts where 16-byte loads cannot."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
