"""The low-rank updates of many devices in one pass over a batch that holds all their tokens.

`add_update_` and `update_gradients_` are the two halves, for an autograd function that also has the
frozen product; `grouped_update` is a differentiable function of its own. Every device gets the
numbers that it gets alone through the same functions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.kernels import dispatch
from fedtune.kernels.low_rank import Groups


def add_update_(
    y: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens in"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "rank out"],
    groups: Groups,
) -> Float[Tensor, "tokens max_rank"]:
    """Add every device's scale (x A^T) B to its rows of y.

    Args:
        a: the devices' factors, one below the other.
        b: the same, each transposed against `Factors.b`.
        groups: which tokens and rows are whose.

    Returns:
        x A^T, which `update_gradients_` needs.
    """
    return dispatch.grouped_low_rank_(y, x, a, b, groups)


def update_gradients_(
    grad_x: Float[Tensor, "tokens in"],
    gradient: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens in"],
    low: Float[Tensor, "tokens max_rank"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "rank out"],
    groups: Groups,
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "rank out"]]:
    """Add the updates' part of the gradient in x; return the gradients of A and B in their dtype.

    Args:
        grad_x: holds the frozen product's part, gradient @ W.
        low: what `add_update_` returned.
    """
    grad_low = dispatch.grouped_low_rank_(grad_x, gradient, b, a, groups)
    grad_a = dispatch.grouped_low_rank_gradient(grad_low, x, groups)
    grad_b = dispatch.grouped_low_rank_gradient(low, gradient, groups)
    return grad_a.to(a.dtype), grad_b.to(b.dtype)


def grouped_update(
    y: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens in"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "rank out"],
    groups: Groups,
) -> Float[Tensor, "tokens out"]:
    """y plus every device's update, in place of y; differentiable in y, x, a and b."""
    result = GroupedLowRank.apply(y, x, a, b, groups)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class GroupedLowRank(torch.autograd.Function):
    """y + scale (x A^T) B by groups; remembers x and x A^T."""

    @staticmethod
    def forward(ctx, y, x, a, b, groups):  # type: ignore[no-untyped-def]  # torch's protocol
        low = add_update_(y, x, a, b, groups)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low, a, b)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, low, a, b = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = torch.zeros_like(x)
        grad_a, grad_b = update_gradients_(grad_x, gradient, x, low, a, b, ctx.groups)
        return gradient, grad_x, grad_a, grad_b, None
