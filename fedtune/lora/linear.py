"""A frozen matrix with a low-rank update that can be exchanged between rounds and devices.

`AdaptedLinear` replaces an `nn.Linear` of the base once; `attach` then gives it the factors of one
device for one round, and `detach` takes them away. The backbone stays, a device costs its factors.

The product follows QLoRA's: y = x W^T + s (x A^T) B^T. The backward pass keeps x and x A^T only,
and asks the storage for W again, so that no dense copy of a quantised matrix outlives a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class FrozenMatrix(Protocol):
    """A matrix (out, in) that never changes, in whatever form it is held."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def bytes(self) -> int:
        """Bytes that the storage keeps."""
        ...

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The dense values for the duration of one product; not to be written to."""
        ...

    def to(self, device: torch.device) -> FrozenMatrix:
        """The same matrix on another device."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """What one device adds to one matrix.

    Attributes:
        a: (rank, in), trained.
        b: (out, rank), trained.
        tail_a: (tail, in), frozen; the part of the global adapter that the device does not train.
        tail_b: (out, tail), frozen.
        scale: alpha / rank, the same for the trained and the frozen part.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    tail_a: Float[Tensor, "tail in"]
    tail_b: Float[Tensor, "out tail"]
    scale: float

    @property
    def trains(self) -> bool:
        return self.a.requires_grad


class AdaptedLinear(nn.Module):
    """`nn.Linear` over a frozen matrix, plus the attached low-rank update."""

    def __init__(self, matrix: FrozenMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.factors: Factors | None = None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.factors is None:
            y = _FrozenProduct.apply(x, self.matrix)  # type: ignore[no-untyped-call]
        else:
            f = self.factors
            y = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
                x, f.a, f.b, f.tail_a, f.tail_b, f.scale, self.matrix
            )
        assert isinstance(y, Tensor)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def attach(layers: Mapping[str, AdaptedLinear], factors: Mapping[str, Factors]) -> None:
    """Give every named layer its factors and take them from all others.

    Raises:
        KeyError: factors for a matrix that the backbone does not adapt.
    """
    unknown = set(factors) - set(layers)
    if unknown:
        raise KeyError(f"no adapted matrix named {sorted(unknown)[0]}")
    for name, layer in layers.items():
        layer.factors = factors.get(name)


def detach(layers: Mapping[str, AdaptedLinear]) -> None:
    """Leave the bare backbone."""
    for layer in layers.values():
        layer.factors = None


class _FrozenProduct(torch.autograd.Function):
    """x W^T, remembering nothing: the gradient asks the storage for W again."""

    @staticmethod
    def forward(ctx, x, matrix):  # type: ignore[no-untyped-def]  # torch's protocol
        ctx.matrix = matrix
        return x @ matrix.values(x.dtype).t()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient @ ctx.matrix.values(gradient.dtype), None


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + s (x A^T) B^T for trained and frozen factors together."""

    @staticmethod
    def forward(ctx, x, a, b, tail_a, tail_b, scale, matrix):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        all_a = torch.cat([a, tail_a]).to(x.dtype)  # (rank + tail, in)
        all_b = torch.cat([b, tail_b], dim=1).to(x.dtype)  # (out, rank + tail)
        y = rows @ matrix.values(x.dtype).t()
        low = rows @ all_a.t()  # (rows, rank + tail)
        y.addmm_(low, all_b.t(), alpha=scale)
        ctx.save_for_backward(rows, low, all_a, all_b)
        ctx.matrix, ctx.scale, ctx.rank = matrix, scale, a.shape[0]
        ctx.factor_dtype, ctx.x_shape = a.dtype, x.shape
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        rows, low, all_a, all_b = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        g_low = (g @ all_b).mul_(ctx.scale)  # (rows, rank + tail)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ ctx.matrix.values(g.dtype)
            grad_x.addmm_(g_low, all_a)
            grad_x = grad_x.reshape(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            grad_a = (g_low[:, : ctx.rank].t() @ rows).to(ctx.factor_dtype)
        if ctx.needs_input_grad[2]:
            grad_b = (g.t() @ low[:, : ctx.rank]).mul_(ctx.scale).to(ctx.factor_dtype)
        return grad_x, grad_a, grad_b, None, None, None, None
