"""What every kernel computes, in plain torch; a fast path takes the same arguments.

Arithmetic is in float32 (float64 for float64) whatever the dtype of the tensors, and results are
rounded once, except where a docstring says otherwise. Every function works on any device, waits
for none, and differentiates nothing: gradients are functions of their own. A name that ends in
`_` means that arguments are written over.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional

from fedtune.kernels.packed import SUPERBLOCK, PackedWeights, padded


def dequantise(packed: PackedWeights, first: int, out: Tensor) -> Tensor:
    """Unpack weights `first`, `first` + 1, ... of the flat row into `out`.

    Args:
        first: a multiple of 256.
        out: contiguous; float32, bfloat16 or float16.

    Returns:
        `out`; every path gives the same bits.
    """
    total = padded(packed.weights)
    blocks = torch.arange(packed.scale_codes.numel(), device=out.device)
    steps = packed.scale_steps[blocks // SUPERBLOCK]
    scales = packed.scale_offset + packed.scale_codes.float() * steps
    codes = _codes(packed.codes, packed.bits, total).long()
    values = packed.codebook[codes] * scales.repeat_interleave(packed.block)[:total]
    return out.copy_(values[first : first + out.numel()].view(out.shape))


def softmax_cross_entropy_(
    logits: Float[Tensor, "rows vocabulary"],
    targets: Int64[Tensor, " rows"],
    weights: Float32[Tensor, " rows"],
) -> Float32[Tensor, " rows"]:
    """Cross-entropy of each row; `weights[row] * d loss / d logits` is written over the logits.

    Args:
        targets: a row whose target is outside the vocabulary, such as -100, has loss 0 and
            gradient 0.
        weights: of rows, in the gradient only; the gradient of a row of weight 0 is 0 whatever its
            logits are.

    Returns:
        Losses, without the weights.
    """
    values = _wide(logits)
    vocabulary = logits.shape[-1]
    counts = (targets >= 0) & (targets < vocabulary)
    if vocabulary == 0:
        return torch.zeros_like(weights)
    index = targets.where(counts, torch.zeros_like(targets))[:, None]
    target_logits = values.gather(1, index)
    shifts = values.amax(1, keepdim=True)
    shifts.masked_fill_(shifts == -torch.inf, 0.0)
    shares = values.sub_(shifts).exp_()
    totals = shares.sum(1, keepdim=True)
    losses = (totals.log() + shifts - target_logits).squeeze(1).masked_fill_(~counts, 0.0)
    row_weights = weights.to(values.dtype).masked_fill(~counts, 0.0)[:, None]
    at_target = (shares.gather(1, index) / totals - 1.0) * row_weights
    shares.mul_(row_weights / totals).scatter_(1, index, at_target)
    silent = row_weights == 0
    if silent.is_cuda or bool(silent.any()):  # a third of the time on a CPU; a GPU is not asked
        shares.masked_fill_(silent, 0.0)
    if shares is not logits:
        logits.copy_(shares)
    return losses


def swiglu(gate: Float[Tensor, "*batch n"], up: Float[Tensor, "*batch n"]) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(_wide(gate)).mul_(_wide(up)).to(gate.dtype)


def swiglu_backward_(
    gradient: Float[Tensor, "*batch n"],
    gate: Float[Tensor, "*batch n"],
    up: Float[Tensor, "*batch n"],
) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to gate and up, written over them."""
    wide_gate, wide_gradient = _wide(gate), _wide(gradient)
    silu = functional.silu(wide_gate)
    gate_gradient = torch.ops.aten.silu_backward(wide_gradient * _wide(up), wide_gate)
    up.copy_(silu.mul_(wide_gradient))
    gate.copy_(gate_gradient)
    return gate, up


def rms_norm(
    x: Float[Tensor, "rows n"],
    weight: Float[Tensor, " n"],
    epsilon: float,
    weight_offset: float = 0.0,
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, " rows"]]:
    """x / sqrt(mean(x ** 2) + epsilon) * (weight_offset + weight), for each row.

    As in transformers, Llama's form (`weight_offset` 0) is rounded to x's dtype before it is
    multiplied by the weight and once more after; Gemma's (`weight_offset` 1) only after.

    Returns:
        The result, in x's dtype; and 1 / sqrt(mean(x ** 2) + epsilon), for the backward pass.
    """
    wide = _wide(x)
    inverse_rms = wide.square().mean(1).add_(epsilon).rsqrt_()
    normal = wide * inverse_rms[:, None]
    if weight_offset == 0.0:
        normal = _wide(normal.to(x.dtype))
    return normal.mul_(_scale(weight, weight_offset, wide)).to(x.dtype), inverse_rms


def rms_norm_backward(
    gradient: Float[Tensor, "rows n"],
    x: Float[Tensor, "rows n"],
    weight: Float[Tensor, " n"],
    inverse_rms: Float[Tensor, " rows"],
    weight_offset: float = 0.0,
) -> Float[Tensor, "rows n"]:
    """Gradient of `rms_norm` with respect to x; the weight is frozen.

    With h = gradient * (weight_offset + weight) and s = inverse_rms:
    s * (h - x * s ** 2 * mean(h * x)).
    """
    wide, inverse = _wide(x), inverse_rms[:, None]
    scaled = _wide(gradient) * _scale(weight, weight_offset, wide)
    along = (scaled * wide).mean(1, keepdim=True) * inverse.square()
    return scaled.sub_(wide * along).mul_(inverse).to(x.dtype)


def rotate_(
    x: Float[Tensor, "tokens heads head_dim"],
    cos: Float[Tensor, "tokens head_dim"],
    sin: Float[Tensor, "tokens head_dim"],
    inverse: bool = False,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Rotary position embedding, written over x: x * cos + rotate_half(x) * sin.

    The halves of a head turn against each other, as in transformers: rotate_half((a, b)) is
    (-b, a).

    Args:
        x: any strides; a view of the fused output of the q, k and v projections will do.
        inverse: multiply by the transpose of the rotation, which is its backward pass.
    """
    first, second = _wide(x).chunk(2, dim=-1)
    cos_first, cos_second = _wide(cos)[:, None].chunk(2, dim=-1)
    sin_first, sin_second = _wide(sin)[:, None].chunk(2, dim=-1)
    if inverse:
        sin_first, sin_second = -sin_second, -sin_first
    turned = first * cos_first - second * sin_first
    x[..., x.shape[-1] // 2 :] = second * cos_second + first * sin_second
    x[..., : x.shape[-1] // 2] = turned
    return x


def _codes(packed: Tensor, bits: int, total: int) -> Tensor:
    if bits == 3:
        low, third = packed[: total // 4], packed[total // 4 :]
        return _codes(low, 2, total) | _codes(third, 1, total) << 2
    shifts = torch.arange(8 - bits, -1, -bits, device=packed.device, dtype=torch.uint8)
    return (packed[:, None] >> shifts & (1 << bits) - 1).view(-1)


def _scale(weight: Tensor, weight_offset: float, like: Tensor) -> Tensor:
    wide = weight.to(like.dtype)
    return wide if weight_offset == 0.0 else wide + weight_offset


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself if its dtype is one that we calculate in, else in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
