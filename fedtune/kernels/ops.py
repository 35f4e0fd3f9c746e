"""The kernels as operators of torch, `torch.ops.fedtune.*`, for code that torch compiles.

Importing this module registers them. They write over none of their arguments, and those of which
it makes sense are differentiable. Our own training step calls `dispatch` instead, whose functions
allocate less and cost less of the CPU's time for each call.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from fedtune.kernels import dispatch
from fedtune.kernels.low_rank import groups_of
from fedtune.kernels.packed import Bits, PackedWeights


@custom_op("fedtune::dequantise", mutates_args=())
def dequantise(
    codes: Tensor,
    scale_codes: Tensor,
    scale_steps: Tensor,
    scale_offset: Tensor,
    codebook: Tensor,
    bits: int,
    block: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense matrix (rows, columns) of packed weights; the fields are those of PackedWeights."""
    packed = PackedWeights(
        codes=codes,
        scale_codes=scale_codes,
        scale_steps=scale_steps,
        scale_offset=scale_offset,
        codebook=codebook,
        bits=cast(Bits, bits),
        block=block,
        shape=(rows, columns),
    )
    return dispatch.dequantise(packed, 0, codes.new_empty((rows, columns), dtype=dtype))


@dequantise.register_fake
def _(
    codes: Tensor,
    scale_codes: Tensor,
    scale_steps: Tensor,
    scale_offset: Tensor,
    codebook: Tensor,
    bits: int,
    block: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((rows, columns), dtype=dtype)


@custom_op("fedtune::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return dispatch.swiglu(gate, up)


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@custom_op("fedtune::swiglu_backward", mutates_args=())
def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to gate and up."""
    return dispatch.swiglu_backward_(gradient, _copy(gate), _copy(up))


@swiglu_backward.register_fake
def _(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@custom_op("fedtune::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm`; the weight gets no gradient."""
    y, inverse_rms = dispatch.rms_norm(x, weight, epsilon, weight_offset)
    return y.contiguous(), inverse_rms


@rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor, epsilon: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=_arithmetic(x.dtype))


@custom_op("fedtune::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, weight_offset: float = 0.0
) -> Tensor:
    """Gradient of `rms_norm` with respect to x."""
    return dispatch.rms_norm_backward(gradient, x, weight, inverse_rms, weight_offset).contiguous()


@rms_norm_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, weight_offset: float = 0.0
) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("fedtune::cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weights * cross-entropies of the rows, and its gradient with respect to the logits.

    The gradient is made with the loss, and only scaled in the backward pass.
    """
    gradient = _copy(logits)
    losses = dispatch.softmax_cross_entropy_(gradient, targets, weights)
    # Rows of weight 0 do not count, even where their loss is not a number.
    return (losses * weights).masked_fill_(weights == 0, 0.0).sum(), gradient


@cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=_arithmetic(logits.dtype)), logits.new_empty(logits.shape)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- autograd
# torch's contexts and inputs have no types of their own, hence Any.


def _keep_swiglu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    gate_gradient, up_gradient = swiglu_backward(gradient, gate, up)
    return gate_gradient, up_gradient


def _keep_rms_norm(
    ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: tuple[Tensor, Tensor]
) -> None:
    x, weight, _, ctx.weight_offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    x, weight, inverse_rms = ctx.saved_tensors
    dx = rms_norm_backward(gradient, x, weight, inverse_rms, ctx.weight_offset)
    return dx, None, None, None


def _keep_cross_entropy(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _cross_entropy_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    (logits_gradient,) = ctx.saved_tensors
    return (logits_gradient * gradient).to(logits_gradient.dtype), None, None


swiglu.register_autograd(_swiglu_gradients, setup_context=_keep_swiglu)
rms_norm.register_autograd(_rms_norm_gradients, setup_context=_keep_rms_norm)
cross_entropy.register_autograd(_cross_entropy_gradients, setup_context=_keep_cross_entropy)


@custom_op("fedtune::packed_product", mutates_args=())
def packed_product(
    x: Tensor,
    codes: Tensor,
    scale_codes: Tensor,
    scale_steps: Tensor,
    scale_offset: Tensor,
    codebook: Tensor,
    bits: int,
    block: int,
    rows: int,
) -> Tensor:
    """x W^T of packed weights; the fields are those of PackedWeights. Not differentiable."""
    packed = PackedWeights(
        codes=codes,
        scale_codes=scale_codes,
        scale_steps=scale_steps,
        scale_offset=scale_offset,
        codebook=codebook,
        bits=cast(Bits, bits),
        block=block,
        shape=(rows, x.shape[1]),
    )
    return dispatch.packed_product(x, packed)


@packed_product.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale_codes: Tensor,
    scale_steps: Tensor,
    scale_offset: Tensor,
    codebook: Tensor,
    bits: int,
    block: int,
    rows: int,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@custom_op("fedtune::grouped_low_rank", mutates_args=())
def grouped_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    token_counts: list[int],
    ranks: list[int],
    scales: list[float],
) -> tuple[Tensor, Tensor]:
    """y plus every adapter's product, and x A^T; see `low_rank.grouped_low_rank_`."""
    groups, result = groups_of(token_counts, ranks, scales, x.device), y.clone()
    return result, dispatch.grouped_low_rank_(result, x, a, b, groups)


@grouped_low_rank.register_fake
def _(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    token_counts: list[int],
    ranks: list[int],
    scales: list[float],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), x.new_empty(x.shape[0], max(ranks, default=0))


@custom_op("fedtune::grouped_low_rank_gradient", mutates_args=())
def grouped_low_rank_gradient(
    left: Tensor, right: Tensor, token_counts: list[int], ranks: list[int], scales: list[float]
) -> Tensor:
    """See `low_rank.grouped_low_rank_gradient`."""
    groups = groups_of(token_counts, ranks, scales, right.device)
    return dispatch.grouped_low_rank_gradient(left, right, groups)


@grouped_low_rank_gradient.register_fake
def _(
    left: Tensor, right: Tensor, token_counts: list[int], ranks: list[int], scales: list[float]
) -> Tensor:
    return right.new_empty(sum(ranks), right.shape[1], dtype=torch.float32)


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, a, b, *ctx.form = inputs
    ctx.save_for_backward(x, a, b, output[1])
    ctx.mark_non_differentiable(output[1])


def _grouped_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, a, b, low = ctx.saved_tensors
    gradient = gradient.contiguous()
    grad_x, grad_low = grouped_low_rank(torch.zeros_like(x), gradient, b, a, *ctx.form)
    grad_a = grouped_low_rank_gradient(grad_low, x, *ctx.form).to(a.dtype)
    grad_b = grouped_low_rank_gradient(low, gradient, *ctx.form).to(b.dtype)
    return gradient, grad_x, grad_a, grad_b, None, None, None


grouped_low_rank.register_autograd(_grouped_gradients, setup_context=_keep_grouped)
