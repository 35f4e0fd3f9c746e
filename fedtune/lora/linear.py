"""A frozen matrix with a low-rank update that can be exchanged between rounds and devices.

`AdaptedLinear` replaces an `nn.Linear` of the base once; `attach` then gives it the factors of one
device for one round, and `detach` takes them away. The backbone stays, a device costs its factors.

The product follows QLoRA's: y = x W^T + s (x A^T) B^T + c. The backward pass keeps x and x A^T of
the trained rows only, and asks the storage for W again, panel by panel, so that no dense copy of a
quantised matrix ever exists as a whole. Layers that share their input (query, key and value; gate
and up) go through `adapted_products` together: their A are stacked, because a product with three
times the rank takes far less than three times as long, and their gradients of x meet in one buffer.

Several simulated devices can be on a backbone at once (`FactorsSideBySide`), each with rows of its
own in a pass. What a device then computes is, call by call, what it would compute alone, so that
its bits are the same; what is shared is the unpacking of the frozen matrix, and every call around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedtune.kernels import dispatch
from fedtune.kernels.low_rank import Groups
from fedtune.lora.one_launch import sides_of

PANEL_WEIGHTS = 1 << 20
"""Weights of a frozen matrix that are dense at one time on a CPU: 4 MB in float32, which stays in
the cache between unpacking and multiplying; chosen."""


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

    def panels(self, dtype: torch.dtype, rows: int = 256) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (first row, dense rows); each valid until the next is asked for.

        Args:
            rows: about how many in a panel; a storage may give more, up to the whole matrix.
        """
        ...

    def to(self, device: torch.device) -> FrozenMatrix:
        """The same matrix on another device."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """What one device adds to one matrix.

    Attributes:
        a: (rank, in), trained. Change it in place, never through `.data`: the layer keeps a
            stacked copy for as long as autograd's version counters stand still.
        b: (out, rank), trained. It may be trained alone, beside a fixed `a`; the input of the layer
            is then not kept for the backward pass.
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
        return self.b.requires_grad


Part: TypeAlias = slice | None
"""Rows of a pass; None for all of them, which costs no view."""


@dataclass(slots=True)
class Rows:
    """Which rows of a pass belong to which device; set before each pass, read in it.

    Attributes:
        bounds: device i has the rows from bounds[i] up to bounds[i + 1].
        groups: how a GPU was told of such bounds; see `fedtune.lora.one_launch`.
    """

    bounds: tuple[int, ...] = ()
    groups: dict[object, Groups] = field(default_factory=dict)

    def parts(self) -> tuple[Part, ...]:
        return tuple(slice(*pair) for pair in pairwise(self.bounds))


@dataclass(frozen=True, slots=True)
class FactorsSideBySide:
    """What several devices add to one matrix, each in its own rows of a pass.

    Attributes:
        devices: of each device; None where it adds nothing.
    """

    devices: tuple[Factors | None, ...]
    rows: Rows


@dataclass(frozen=True, slots=True)
class Correction:
    """A frozen pair that repairs what a format did to a matrix: W is close to Q(W) + b a.

    It belongs to the device's backbone: no gradient reaches it and it never travels.
    """

    a: Float[Tensor, "correction in"]
    b: Float[Tensor, "out correction"]


class AdaptedLinear(nn.Module):
    """`nn.Linear` over a frozen matrix, plus the attached low-rank update.

    Attributes:
        correction: frozen repair of the matrix's format; None where there is none.
        keeps_values: hand the dense matrix on from the forward to the backward pass instead of
            unpacking it again. For blocks that are recomputed (checkpointing): what is saved in
            their first pass is dropped, so that one block at a time is dense, and the second of
            three unpackings is the last.
        observe: called with the inputs (tokens, in) of every product; None: nobody looks.
        observe_gradient: called in the backward pass of every product with dL/dy (tokens, out) and
            the inputs (tokens, in), whose product is the gradient of the matrix; None: nobody
            looks. Factors of rank 0 that require gradients let it see without training anything.
            Not called where several devices' products go together on a GPU.
    """

    def __init__(self, matrix: FrozenMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.factors: Factors | FactorsSideBySide | None = None
        self.correction: Correction | None = None
        self.keeps_values = False
        self.observe: Callable[[Tensor], None] | None = None
        self.observe_gradient: Callable[[Tensor, Tensor], None] | None = None
        self._held: dict[int, _Held] = {}
        self._stacked: dict[tuple[int, int], _Stacked] = {}

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return adapted_products(x, (self,))[0]


def adapted_products(
    x: Float[Tensor, "*batch in"], layers: Sequence[AdaptedLinear]
) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input, as one step of autograd.

    Equal to calling each layer, up to the rounding of sums.

    Args:
        x: the input of every layer; its dtype is the one to compute in.
    """
    outputs = Products.apply(x, tuple(layers), *factor_tensors(layers))  # type: ignore[no-untyped-call]
    return tuple(
        # A bias that is trained whole needs its own gradient.
        y + layer.bias if layer.bias is not None and layer.bias.requires_grad else y
        for y, layer in zip(outputs, layers, strict=True)
    )


_DeviceFactors: TypeAlias = tuple[Factors | None, ...]
"""What one device adds to each of some layers."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What is on some layers, sorted by device; made anew only when it is replaced.

    Attributes:
        of: what it was made of, by identity: each layer's factors and correction.
        devices: each device's factors of all layers.
        rows: of each device; None where one device has them all.
        tensors: a and b of each layer in turn, for one device after another; None where absent.
    """

    of: tuple[object, ...]
    devices: tuple[_DeviceFactors, ...]
    rows: Rows | None
    tensors: tuple[Tensor | None, ...]

    def parts(self) -> tuple[Part, ...]:
        return _ALL_ROWS if self.rows is None else self.rows.parts()


_ALL_ROWS: tuple[Part, ...] = (None,)


def _held(layers: Sequence[AdaptedLinear]) -> _Held:
    """What is on these layers. Kept by the first of them, beside sets of another size."""
    found = layers[0]._held.get(len(layers))
    if found is not None:
        of = iter(found.of)
        # Identity, layer by layer: another set of layers has other factors.
        if all(layer.factors is next(of) and layer.correction is next(of) for layer in layers):
            return found
    devices, rows = _devices(layers)
    every = [f for factors in devices for f in factors]
    found = layers[0]._held[len(layers)] = _Held(
        tuple(part for layer in layers for part in (layer.factors, layer.correction)),
        devices,
        rows,
        tuple(t for f in every for t in ((None, None) if f is None else (f.a, f.b))),
    )
    return found


def _devices(layers: Sequence[AdaptedLinear]) -> tuple[tuple[_DeviceFactors, ...], Rows | None]:
    """The devices on these layers, and the rows of each; one device has them all."""
    held = [layer.factors for layer in layers]
    beside = next((f for f in held if isinstance(f, FactorsSideBySide)), None)
    if beside is None:
        return (tuple(f for f in held if not isinstance(f, FactorsSideBySide)),), None
    every = [
        f.devices if isinstance(f, FactorsSideBySide) else (None,) * len(beside.devices)
        for f in held
    ]
    return tuple(zip(*every, strict=True)), beside.rows


def factor_tensors(layers: Sequence[AdaptedLinear]) -> tuple[Tensor | None, ...]:
    """a and b of each layer in turn, for one device after another; None for absent factors.

    What a step of autograd over these layers takes, and gives gradients to.
    """
    return _held(layers).tensors


def attach(
    layers: Mapping[str, AdaptedLinear], factors: Mapping[str, Factors | FactorsSideBySide]
) -> None:
    """Give every named layer its factors and take them from all others.

    Raises:
        KeyError: factors for a matrix that the backbone does not adapt.
    """
    unknown = set(factors) - set(layers)
    if unknown:
        raise KeyError(f"no adapted matrix named {sorted(unknown)[0]}")
    for name, layer in layers.items():
        layer.factors = factors.get(name)
        layer._held.clear()
        layer._stacked.clear()


def forget_stacks(layers: Iterable[AdaptedLinear]) -> None:
    """Let the next pass stack the factors anew; around a recording, which owns what it makes."""
    for layer in layers:
        layer._stacked.clear()


def detach(layers: Mapping[str, AdaptedLinear]) -> None:
    """Leave the bare backbone."""
    attach(layers, {})


# ---------------------------------------------------------------- the low-rank side


@dataclass(frozen=True, slots=True)
class _Stacked:
    """The low-rank factors of some layers, side by side, in the dtype of a product.

    Each layer has consecutive rows of `a`: its trained rows, its tail and its correction.

    Attributes:
        held: what it was made of.
        versions: of every trained tensor, when it was made.
        b: (rows, out) of each layer: its B, turned, which makes its two products up to twice as
            fast. The correction's part is divided by the layer's scale, so that one factor serves
            all of it.
        sizes: how many rows each layer has in `a`.
        trained: how many of them, from each layer's first, are trained.
        trains_a: whether any A is trained, and not B alone.
    """

    held: _Held
    versions: tuple[int, ...]
    a: Tensor
    b: tuple[Tensor, ...]
    scales: tuple[float, ...]
    sizes: tuple[int, ...]
    trained: tuple[int, ...]
    trains_a: bool

    @property
    def trains(self) -> bool:
        return any(self.trained)

    def of_layers(self, low: Tensor) -> Sequence[Tensor]:
        """(tokens, rows) cut into the columns of each layer."""
        return (low,) if len(self.sizes) == 1 else torch.split_with_sizes(low, self.sizes, 1)

    def trained_columns(self, low: Tensor) -> Tensor:
        """(tokens, trained rows) out of (tokens, rows)."""
        if self.trained == self.sizes:
            return low
        parts = zip(self.of_layers(low), self.trained, strict=True)
        return torch.cat([part[:, :count] for part, count in parts], dim=1)


def _stacked(layers: tuple[AdaptedLinear, ...], held: _Held, dtype: torch.dtype) -> list[_Stacked]:
    """The stack of each device's factors, made anew only when something in it has changed.

    Kept by the first layer, for the micro-batches of a step and for recomputed blocks.
    """
    stacks = []
    kept_by, count = layers[0]._stacked, len(layers)
    for device, factors in enumerate(held.devices):
        # Tensors are not compared: that would compare their values.
        versions = tuple(
            [v for f in factors if f is not None for v in (f.a._version, f.b._version)]
        )
        kept = kept_by.get((device, count))
        if (
            kept is None
            or kept.held is not held
            or kept.versions != versions
            or kept.a.dtype is not dtype
        ):
            kept = _stack(held, versions, layers, factors, dtype)
            kept_by[(device, count)] = kept
        stacks.append(kept)
    return stacks


def _stack(
    held: _Held,
    versions: tuple[int, ...],
    layers: tuple[AdaptedLinear, ...],
    factors: _DeviceFactors,
    dtype: torch.dtype,
) -> _Stacked:
    every_a: list[Tensor] = []
    every_b, scales, sizes, trained = [], [], [], []
    for layer, f in zip(layers, factors, strict=True):
        correction = layer.correction
        scale = 1.0 if f is None else f.scale
        a = [] if f is None else [f.a.detach(), f.tail_a]
        b = [] if f is None else [f.b.detach(), f.tail_b]
        if correction is not None:
            a.append(correction.a)
            b.append(correction.b / scale)
        every_a += a
        every_b.append(_joined([part.t() for part in b], dtype).contiguous())
        scales.append(scale)
        sizes.append(sum(part.shape[0] for part in a))
        trained.append(f.a.shape[0] if f is not None and f.trains else 0)
    a_rows = _joined(every_a, dtype)
    trains_a = any(f is not None and f.a.requires_grad for f in factors)
    return _Stacked(
        held,
        versions,
        a_rows,
        tuple(every_b),
        tuple(scales),
        tuple(sizes),
        tuple(trained),
        trains_a,
    )


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The rows of all parts; the very tensor where there is but one and of that dtype."""
    held = [
        part if part.dtype is dtype else part.to(dtype, memory_format=torch.contiguous_format)
        for part in parts
        if part.shape[0]
    ]
    if not held:
        return torch.empty(0, 0, dtype=dtype)
    return held[0] if len(held) == 1 else torch.cat(held)


# ---------------------------------------------------------------- the product


class Products(torch.autograd.Function):
    """x W^T + s (x A^T) B^T + c of several layers, for trained and frozen factors together.

    Rows are cut by device; each has a stack of its own.
    """

    @staticmethod
    def forward(ctx, x, layers, *pairs):  # type: ignore[no-untyped-def]  # torch's protocol
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        for layer in layers:
            if layer.observe is not None:
                layer.observe(rows)
        held = _held(layers)
        parts, stacks = held.parts(), _stacked(layers, held, x.dtype)
        if held.rows is not None and _in_one_launch(rows):
            return _beside(ctx, x.shape, rows, layers, held.rows, stacks, pairs)  # type: ignore[no-untyped-call]
        # (tokens of the device, rows of its stack)
        lows = [
            torch.mm(_cut(rows, part), stack.a.t()) if stack.a.numel() else None
            for part, stack in zip(parts, stacks, strict=True)
        ]
        by_layer = [
            None if low is None else stack.of_layers(low)
            for low, stack in zip(lows, stacks, strict=True)
        ]
        outputs, dense = [], []
        for i, layer in enumerate(layers):
            kept = layer.matrix.values(x.dtype) if layer.keeps_values else None
            y = _frozen_product(rows, parts, layer, kept)
            for part, stack, low in zip(parts, stacks, by_layer, strict=True):
                if low is not None and stack.sizes[i]:
                    _cut(y, part).addmm_(low[i], stack.b[i], alpha=stack.scales[i])
            outputs.append(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]))
            dense.append(kept)
        keeps_rows = any(stack.trains_a for stack in stacks) or any(
            layer.observe_gradient is not None for layer in layers
        )
        kept_lows = [
            stack.trained_columns(low) if stack.trains and low is not None else None
            for stack, low in zip(stacks, lows, strict=True)
        ]
        of_stacks = [tensor for stack in stacks for tensor in (stack.a, *stack.b)]
        ctx.save_for_backward(rows if keeps_rows else None, *kept_lows, *of_stacks, *dense)
        ctx.layers, ctx.stacks, ctx.parts, ctx.x_shape = layers, stacks, parts, x.shape
        ctx.factor_dtypes = [None if f is None else f.dtype for f in pairs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        if ctx.parts is None:
            return _beside_backward(ctx, gradients)  # type: ignore[no-untyped-call]
        layers, stacks, parts = ctx.layers, ctx.stacks, ctx.parts
        rows, *rest = ctx.saved_tensors
        # The stacks are held by the context; saving their tensors lets autograd see a change.
        lows, dense = rest[: len(parts)], rest[len(rest) - len(layers) :]
        flat = [g if g.dim() == 2 else g.reshape(-1, g.shape[-1]) for g in gradients]
        for layer, g in zip(layers, flat, strict=True):
            if layer.observe_gradient is not None:
                layer.observe_gradient(g, rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _frozen_gradient(flat, parts, layers, dense)
        pairs: list[Tensor | None] = []
        for part, stack, low in zip(parts, stacks, lows, strict=True):
            own = flat if part is None else [g[part] for g in flat]
            g_low = _low_gradient(own, stack)
            if grad_x is not None and stack.a.numel():
                _cut(grad_x, part).addmm_(g_low, stack.a)
            taken = _cut(rows, part) if stack.trains_a else None
            dtypes = ctx.factor_dtypes[len(pairs) : len(pairs) + 2 * len(layers)]
            pairs += _factor_gradients(own, taken, low, g_low, stack, dtypes)
        if grad_x is not None and grad_x.shape != ctx.x_shape:
            grad_x = grad_x.view(ctx.x_shape)
        return grad_x, None, *pairs


def _in_one_launch(rows: Tensor) -> bool:
    """Whether several devices' products go together, as `fedtune.lora.one_launch` says why."""
    return rows.is_cuda


def _beside(ctx, shape, rows, layers, where, stacks, pairs):  # type: ignore[no-untyped-def]
    """The forward pass of several devices on a GPU."""
    counts = [end - start for start, end in pairwise(where.bounds)]
    sides = sides_of(stacks, counts, where.groups)
    outputs, lows, dense = [], [], []
    for layer, side in zip(layers, sides, strict=True):
        kept = layer.matrix.values(rows.dtype) if layer.keeps_values else None
        y = _frozen_product(rows, _ALL_ROWS, layer, kept)
        lows.append(None if side is None else side.add_(y, rows))
        outputs.append(y.view(*shape[:-1], y.shape[-1]))
        dense.append(kept)
    ctx.save_for_backward(rows, *lows, *dense)
    ctx.layers, ctx.sides, ctx.parts, ctx.x_shape = layers, sides, None, shape
    ctx.factor_dtypes = [None if f is None else f.dtype for f in pairs]
    return tuple(outputs)


def _beside_backward(ctx, gradients):  # type: ignore[no-untyped-def]
    """The backward pass of several devices on a GPU."""
    layers = ctx.layers
    rows, *rest = ctx.saved_tensors
    lows, dense = rest[: len(layers)], rest[len(layers) :]
    flat = [g.reshape(-1, g.shape[-1]).contiguous() for g in gradients]
    if ctx.needs_input_grad[0]:
        grad_x = _frozen_gradient(flat, _ALL_ROWS, layers, dense)
    else:
        grad_x = torch.zeros_like(rows)
    pairs: list[Tensor | None] = [None] * len(ctx.factor_dtypes)
    for i, (side, low, g) in enumerate(zip(ctx.sides, lows, flat, strict=True)):
        found = [] if side is None else side.gradients(grad_x, g, rows, low)
        for device, pair in enumerate(found):
            first = 2 * (device * len(layers) + i)
            for place, gradient in enumerate(pair, start=first):
                if gradient is not None:
                    pairs[place] = gradient.to(ctx.factor_dtypes[place])
    return grad_x.view(ctx.x_shape) if ctx.needs_input_grad[0] else None, None, *pairs


def _cut(rows: Tensor, part: Part) -> Tensor:
    """A device's rows of a pass."""
    return rows if part is None else rows[part]


def _low_gradient(gradients: Sequence[Tensor], stack: _Stacked) -> Tensor:
    """s (dL/dy) B, of every row of the stack: (tokens, rows of the stack)."""
    g_low = gradients[0].new_empty(gradients[0].shape[0], stack.a.shape[0])
    parts = stack.of_layers(g_low)
    for g, b, scale, part in zip(gradients, stack.b, stack.scales, parts, strict=True):
        if part.numel():
            _scaled_product(g, b.t(), scale, part)
    return g_low


def _factor_gradients(
    gradients: Sequence[Tensor],
    rows: Tensor | None,
    low: Tensor | None,
    g_low: Tensor,
    stack: _Stacked,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """Gradients of A and B of each layer in turn; None for what is not trained."""
    pairs: list[Tensor | None] = [None] * (2 * len(gradients))
    if low is None:
        return pairs
    grad_a = None
    if rows is not None:
        grad_a = torch.mm(stack.trained_columns(g_low).t(), rows)  # (trained rows, in)
    turned = low.t()
    start = 0
    for i, (g, count) in enumerate(zip(gradients, stack.trained, strict=True)):
        if count:
            whole = count == len(turned)
            own_low = turned if whole else turned[start : start + count]
            # This way round: a tall result of the same product takes up to ten times as long on
            # a CPU.
            grad_b = torch.mm(own_low, g).t()  # (out, rank)
            if grad_b.dtype is not dtypes[2 * i + 1]:
                grad_b = grad_b.to(dtypes[2 * i + 1])
            if grad_a is not None:
                own_a = grad_a if whole else grad_a[start : start + count]
                pairs[2 * i] = own_a if own_a.dtype is dtypes[2 * i] else own_a.to(dtypes[2 * i])
            pairs[2 * i + 1] = grad_b if stack.scales[i] == 1.0 else grad_b * stack.scales[i]
        start += count
    return pairs


def _frozen_product(
    rows: Tensor, parts: Sequence[Part], layer: AdaptedLinear, dense: Tensor | None
) -> Tensor:
    """x W^T + c, panel by panel."""
    bias: Tensor | None = layer.bias
    if bias is not None:
        bias = None if bias.requires_grad else bias.to(rows.dtype)
    packed = getattr(layer.matrix, "packed", None)
    if packed is not None and dispatch.packed_product_wins(rows.shape[0], packed, rows.dtype):
        # Few tokens on an accelerator: reading the packed weights is most of the work.
        y = dispatch.packed_product(rows, packed)
        return y if bias is None else y.add_(bias)
    empty: Tensor | None = None
    for first, panel in _panels(layer.matrix, rows.dtype, dense):
        if parts is _ALL_ROWS and panel.shape[0] == layer.out_features:
            return functional.linear(rows, panel, bias)
        if empty is None:
            empty = rows.new_empty(rows.shape[0], layer.out_features)
        columns = slice(first, first + panel.shape[0])
        for part in parts:
            out = _cut(empty, part)[:, columns]
            if bias is None:
                torch.mm(_cut(rows, part), panel.t(), out=out)
            else:
                torch.addmm(bias[columns], _cut(rows, part), panel.t(), out=out)
    return rows.new_empty(rows.shape[0], layer.out_features) if empty is None else empty


def _frozen_gradient(
    gradients: Sequence[Tensor],
    parts: Sequence[Part],
    layers: Sequence[AdaptedLinear],
    dense: Sequence[Tensor | None],
) -> Tensor:
    """(dL/dy) W summed over the layers, in one buffer."""
    grad_x: Tensor | None = None
    for g, layer, kept in zip(gradients, layers, dense, strict=True):
        for first, panel in _panels(layer.matrix, g.dtype, kept):
            whole = panel.shape[0] == g.shape[1]
            of_panel = g if whole else g[:, first : first + panel.shape[0]]
            begun = grad_x is not None
            if grad_x is None:
                grad_x = g.new_empty(g.shape[0], layer.in_features)
            for part in parts:
                into, own = _cut(grad_x, part), _cut(of_panel, part)
                if begun:
                    into.addmm_(own, panel)
                else:
                    torch.mm(own, panel, out=into)
    assert grad_x is not None
    return grad_x


def _panels(
    matrix: FrozenMatrix, dtype: torch.dtype, dense: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """(first row, dense rows) of a matrix; each is valid until the next is asked for."""
    if dense is not None:
        return iter([(0, dense)])
    return matrix.panels(dtype, max(64, PANEL_WEIGHTS // matrix.shape[1]))


def _scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """out = scale * left @ right, in one pass."""
    torch.addmm(out, left, right, beta=0.0, alpha=scale, out=out)
