"""Steps of a Llama-shaped block as single steps of autograd, which keep what cannot be made again.

A product's gradient needs the product's input. Where that input is a norm's or an activation's
output, it is made anew in the backward pass from what is kept anyway. So a block keeps: the input
of each norm, q, k, v, the attention's output, gate and up, and the low-rank intermediates.

The gradients that reach these steps come from the next of them and belong to nobody else, so some
are written over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fedtune.kernels.dispatch import (
    rms_norm,
    rms_norm_backward,
    rotate_,
    swiglu,
    swiglu_backward_,
)
from fedtune.lora.linear import AdaptedLinear, Products, factor_tensors

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Norm:
    """Root-mean-square norm: y = x / rms(x) * (offset + weight).

    Attributes:
        offset: 0 as in Llama, 1 as in Gemma.
    """

    weight: Float[Tensor, " size"]
    epsilon: float
    offset: float = 0.0

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(y, 1 / rms) of (rows, size)."""
        return rms_norm(rows, self.weight, self.epsilon, self.offset)

    def back(self, gradient: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        """dL/dx from dL/dy."""
        return rms_norm_backward(gradient, rows, self.weight, inverse, self.offset)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of some of a product's outputs.

    Attributes:
        outputs: how many of the outputs are turned, from the first.
        dim: of one head.
    """

    cos: Float[Tensor, "tokens dim"]
    sin: Float[Tensor, "tokens dim"]
    outputs: int
    dim: int

    def turn_(self, outputs: Sequence[Tensor], inverse: bool = False) -> None:
        """Turn outputs in place, or back."""
        for y in outputs[: self.outputs]:
            rotate_(y.view(len(self.cos), -1, self.dim), self.cos, self.sin, inverse)


def normed(x: Float[Tensor, "*batch size"], norm: Norm) -> Float[Tensor, "*batch size"]:
    """The norm alone; keeps x and a number per row."""
    y = _Normed.apply(x, norm, None)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


def normed_and_turned(
    x: Float[Tensor, "tokens heads dim"], norm: Norm, rotation: Rotation
) -> Float[Tensor, "tokens heads dim"]:
    """Norm of each head, then its rotation, as Qwen 3 has them."""
    y = _Normed.apply(x, norm, rotation)  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


def normed_products(
    x: Float[Tensor, "*batch in"],
    norm: Norm,
    layers: Sequence[AdaptedLinear],
    rotation: Rotation | None = None,
) -> tuple[Tensor, ...]:
    """Several layers over the norm of one input; keeps the input, not its norm."""
    outputs = _NormedProducts.apply(x, norm, tuple(layers), rotation, *factor_tensors(layers))  # type: ignore[no-untyped-call]
    return tuple(outputs)


def gated_product(
    gate: Float[Tensor, "*batch in"],
    up: Float[Tensor, "*batch in"],
    activation: Activation,
    layer: AdaptedLinear,
) -> Float[Tensor, "*batch out"]:
    """A layer over activation(gate) * up; keeps gate and up, not what is made of them.

    Its backward pass writes over gate and up: nothing else may use them.
    """
    y = _GatedProduct.apply(gate, up, activation, layer, *factor_tensors((layer,)))  # type: ignore[no-untyped-call]
    assert isinstance(y, Tensor)
    return y


class _Normed(torch.autograd.Function):
    """Norm over the last axis, then perhaps a rotation."""

    @staticmethod
    def forward(ctx, x, norm, rotation):  # type: ignore[no-untyped-def]  # torch's protocol
        rows = x.reshape(-1, x.shape[-1])
        y, inverse = norm.of(rows)
        if rotation is not None:
            rotation.turn_([y])
        ctx.save_for_backward(rows, inverse)
        ctx.norm, ctx.rotation, ctx.shape = norm, rotation, x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        rows, inverse = ctx.saved_tensors
        g = gradient.contiguous()
        if ctx.rotation is not None:
            ctx.rotation.turn_([g], inverse=True)
        return ctx.norm.back(g.view(rows.shape), rows, inverse).view(ctx.shape), None, None


class _Inside:
    """The context of a step of autograd that runs inside another."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.without: list[bool] = []

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def drop(self, made: Tensor) -> tuple[Tensor | None, ...]:
        """What the inner step wants kept, less the tensor that can be made again."""
        self.without = [
            t is not None and t.data_ptr() == made.data_ptr() for t in self.saved_tensors
        ]
        kept = tuple(
            None if gone else t for t, gone in zip(self.saved_tensors, self.without, strict=True)
        )
        self.saved_tensors = ()
        return kept

    @property
    def misses(self) -> bool:
        return any(self.without)

    def restore(self, kept: Sequence[Tensor | None], made: Tensor | None) -> None:
        """Put what was kept, and what was made again as (rows, size), in their places."""
        self.saved_tensors = tuple(
            made if gone else t for t, gone in zip(kept, self.without, strict=True)
        )


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, layers, rotation, *pairs):  # type: ignore[no-untyped-def]
        rows = x.reshape(-1, x.shape[-1])
        y, inverse = norm.of(rows)
        inside = _Inside((ctx.needs_input_grad[0], False, *ctx.needs_input_grad[4:]))
        outputs = Products.forward(inside, y.view(x.shape), layers, *pairs)  # type: ignore[no-untyped-call]
        if rotation is not None:
            rotation.turn_(outputs)
        ctx.save_for_backward(rows, inverse, *inside.drop(y))
        ctx.inside, ctx.norm, ctx.rotation, ctx.shape = inside, norm, rotation, x.shape
        return outputs

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        rows, inverse, *kept = ctx.saved_tensors
        inside = ctx.inside
        if ctx.rotation is not None:
            gradients = tuple(g.contiguous() for g in gradients)
            ctx.rotation.turn_(gradients, inverse=True)
        inside.restore(kept, ctx.norm.of(rows)[0] if inside.misses else None)
        found, _, *pairs = Products.backward(inside, *gradients)  # type: ignore[no-untyped-call]
        inside.saved_tensors = ()
        if found is not None:
            found = ctx.norm.back(found.view(rows.shape), rows, inverse).view(ctx.shape)
        return found, None, None, None, *pairs


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, layer, *pairs):  # type: ignore[no-untyped-def]
        product = _activated(gate, up, activation)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inside = _Inside((needed, False, *ctx.needs_input_grad[4:]))
        (y,) = Products.forward(inside, product, (layer,), *pairs)  # type: ignore[no-untyped-call]
        ctx.save_for_backward(gate, up, *inside.drop(product))
        ctx.inside, ctx.activation = inside, activation
        return y

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        inside = ctx.inside
        if inside is None:
            raise RuntimeError(
                "a block's activations were written over by an earlier backward pass"
            )
        ctx.inside = None
        gate, up, *kept = ctx.saved_tensors
        made = None
        if inside.misses:
            made = _activated(gate, up, ctx.activation).view(-1, gate.shape[-1])
        inside.restore(kept, made)
        found, _, *pairs = Products.backward(inside, gradient)  # type: ignore[no-untyped-call]
        inside.saved_tensors = ()
        if found is None:
            return None, None, None, None, *pairs
        return *_activated_backward_(found, gate, up, ctx.activation), None, None, *pairs


def _activated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return swiglu(gate, up)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def _activated_backward_(
    gradient: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        return swiglu_backward_(gradient, gate, up)
    down = functional.gelu(gate, approximate="tanh").mul_(gradient)
    return torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh"), down
