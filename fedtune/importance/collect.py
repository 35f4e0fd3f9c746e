"""What a device gathers of its gradients while it measures: sums, matrix by matrix.

A layer shows dL/dy and its input in the backward pass, and their product is the gradient of its
matrix. Here it is never formed, but for a panel of one matrix at a time: a sketch needs two thin
products, and |W * gradient| goes panel by panel. What is kept between passes is what will be sent,
and for `adalora` the singular vectors that it looks at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.importance.sketch import Side, signs
from fedtune.lora.linear import PANEL_WEIGHTS, AdaptedLinear, Factors, FrozenMatrix, attach, detach
from fedtune.model.backbone import Backbone
from fedtune.records import FloatArray
from fedtune.wire.calibration import MEASURED_METHODS, MeasuredMethod, left_size, sketch_size

__all__ = ["MEASURED_METHODS", "Collector", "collecting"]

_PASSES: Final = 2
"""Power iterations for the weights' singular vectors; their spectra fall slowly, and two bring
most of what is to be had (Halko et al., arXiv 0909.4061, section 4.5)."""


class _Gatherer(Protocol):
    """Adds one pass of one matrix to its sums."""

    def add(self, g: Tensor, x: Tensor, factor: float) -> None: ...

    def sums(self) -> Mapping[str, Tensor]: ...


@dataclass(slots=True)
class Collector:
    """The sums of a measurement.

    Attributes:
        present: which tokens of the pass are no padding, in any shape; None: all. Set before each
            pass.
        factor: what a pass's gradients are multiplied with to be those of its summed loss.
    """

    gatherers: Mapping[str, _Gatherer]
    present: Tensor | None = None
    factor: float = 1.0

    def see(self, name: str, g: Tensor, x: Tensor) -> None:
        """Add what one product of a matrix shows; padding counts for nothing."""
        present = self.present
        if present is not None and present.numel() == g.shape[0]:
            where = present.flatten()
            g, x = g[where], x[where]
        self.gatherers[name].add(g, x, self.factor)

    def tensors(self) -> dict[str, FloatArray]:
        """Name, as on the wire -> sum."""
        return {
            f"{name}.{part}": value.cpu().numpy()
            for name, gatherer in self.gatherers.items()
            for part, value in gatherer.sums().items()
        }


@contextmanager
def collecting(
    backbone: Backbone, method: MeasuredMethod, rank: int, seed: int
) -> Iterator[Collector]:
    """Let the backbone's layers show their gradients for a while; hold its lock.

    Factors of rank 0 on every layer lead the backward pass down to the first of them.

    Args:
        rank: how many directions of a matrix are asked for.
        seed: of the sketches; the same on every device.
    """
    layers = backbone.layers
    collector = Collector(
        {name: _gatherer(method, name, layer, rank, seed) for name, layer in layers.items()}
    )
    device = next(backbone.model.parameters()).device
    attach(layers, {name: _nothing(layer, device) for name, layer in layers.items()})
    for name, layer in layers.items():
        layer.observe_gradient = lambda g, x, name=name: collector.see(name, g, x)
    try:
        yield collector
    finally:
        for layer in layers.values():
            layer.observe_gradient = None
        detach(layers)


def _nothing(layer: AdaptedLinear, device: torch.device) -> Factors:
    """Factors that add nothing, and through which gradients flow."""
    a = torch.zeros(0, layer.in_features, device=device)
    b = torch.zeros(layer.out_features, 0, device=device)
    return Factors(a.clone().requires_grad_(), b.clone().requires_grad_(), a, b, 1.0)


def _gatherer(
    method: MeasuredMethod, name: str, layer: AdaptedLinear, rank: int, seed: int
) -> _Gatherer:
    shape = layer.matrix.shape
    if method == "spectrum":
        return _Sketches(seed, name, shape, sketch_size(rank, *shape), _squared_norm(layer.matrix))
    if method == "activation":
        return _Inputs(seed, name, shape[1], sketch_size(rank, *shape))
    if method == "adalora":
        return _Triplets(name, layer.matrix, min(rank, *shape), seed)
    return _Sensitivity(layer.matrix)


# ---------------------------------------------------------------- one per method


@dataclass(slots=True)
class _Sketches:
    """G Omega and Psi G, and the squared norm of W once for every pass."""

    seed: int
    name: str
    shape: tuple[int, int]
    size: int
    squared_norm: Tensor
    passes: int = 0
    right: Tensor | None = None
    left: Tensor | None = None

    def add(
        self, g: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], factor: float
    ) -> None:
        out, inputs = self.shape
        omega = _signs(self.seed, self.name, "right", inputs, self.size, x)
        right = torch.mm(g.t(), torch.mm(x, omega)).float()
        psi = _signs(self.seed, self.name, "left", left_size(self.size), out, g)
        left = torch.mm(torch.mm(psi, g.t()), x).float()
        self.passes += 1
        self.right = _added(self.right, right, factor)
        self.left = _added(self.left, left, factor)

    def sums(self) -> Mapping[str, Tensor]:
        out, inputs = self.shape
        return {
            "right": _or_zeros(self.right, out, self.size),
            "left": _or_zeros(self.left, left_size(self.size), inputs),
            "weight": self.squared_norm * self.passes,
        }


@dataclass(slots=True)
class _Inputs:
    """X^T X Omega, and the sum of all squares."""

    seed: int
    name: str
    inputs: int
    size: int
    sketch: Tensor | None = None
    energy: Tensor | None = None

    def add(self, g: Tensor, x: Float[Tensor, "tokens in"], factor: float) -> None:
        omega = _signs(self.seed, self.name, "inputs", self.inputs, self.size, x)
        self.sketch = _added(self.sketch, torch.mm(x.t(), torch.mm(x, omega)).float(), 1.0)
        self.energy = _added(self.energy, x.float().square().sum().view(1), 1.0)

    def sums(self) -> Mapping[str, Tensor]:
        return {
            "inputs": _or_zeros(self.sketch, self.inputs, self.size),
            "energy": _or_zeros(self.energy, 1),
        }


@dataclass(slots=True)
class _Sensitivity:
    """Sum over the entries of |W * G|, pass by pass."""

    matrix: FrozenMatrix
    total: Tensor | None = None

    def add(
        self, g: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], factor: float
    ) -> None:
        turned = g.t()
        for first, panel in _panels(self.matrix, x.dtype):
            of_panel = turned[first : first + panel.shape[0]]
            product = torch.mm(of_panel, x).mul_(panel)
            self.total = _added(self.total, product.abs_().sum(dtype=torch.float32).view(1), factor)

    def sums(self) -> Mapping[str, Tensor]:
        return {"sensitivity": _or_zeros(self.total, 1)}


class _Triplets:
    """Sensitivity of the weights' leading singular triplets, and its square, pass by pass.

    With W = sum of p_i lambda_i q_i^T, a triplet's score is the sum of |value * gradient| of
    lambda_i, the mean over the entries of p_i and the mean over those of q_i.

    Source:
        AdaLoRA (arXiv 2303.10512, equations 6 and 8); there of a trained update, here of the frozen
        weights, whose update is still zero.
    """

    def __init__(self, name: str, matrix: FrozenMatrix, rank: int, seed: int) -> None:
        self._values, self._left, self._right = _leading_triplets(name, matrix, rank, seed)
        self._score = torch.zeros_like(self._values)
        self._square = torch.zeros_like(self._values)

    def add(
        self, g: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], factor: float
    ) -> None:
        left, right = self._left.to(g.dtype), self._right.to(x.dtype)
        of_left = torch.mm(g.t(), torch.mm(x, right)).float() * factor  # G q_i: (out, rank)
        of_right = torch.mm(x.t(), torch.mm(g, left)).float() * factor  # G^T p_i: (in, rank)
        alone = (self._left * of_left).sum(dim=0)  # p_i^T G q_i
        score = self._values * (
            alone.abs()
            + (self._left * of_left).abs().mean(dim=0)
            + (self._right * of_right).abs().mean(dim=0)
        )
        self._score += score
        self._square += score.square()

    def sums(self) -> Mapping[str, Tensor]:
        return {"score": self._score, "square": self._square}


def _leading_triplets(
    name: str, matrix: FrozenMatrix, rank: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(rank,) values, (out, rank) and (in, rank) vectors, of one panel of the matrix at a time."""
    size = min(rank + 8, *matrix.shape)
    probe = signs(seed, name, "right", matrix.shape[1], size)
    basis: Tensor | None = None
    for _ in range(1 + _PASSES):
        right = torch.from_numpy(probe.astype(np.float32)) if basis is None else basis
        across = torch.linalg.qr(_times(matrix, right)).Q  # (out, size)
        down = _turned_times(matrix, across)  # (in, size)
        basis = torch.linalg.qr(down).Q
    left, values, right = torch.linalg.svd(down.t(), full_matrices=False)
    return values[:rank], (across @ left)[:, :rank].contiguous(), right[:rank].t().contiguous()


def _squared_norm(matrix: FrozenMatrix) -> Float[Tensor, " 1"]:
    parts = [panel.square().sum() for _, panel in _panels(matrix, torch.float32)]
    return torch.stack(parts).sum().view(1)


def _times(matrix: FrozenMatrix, right: Float[Tensor, "in size"]) -> Float[Tensor, "out size"]:
    parts = [torch.mm(panel, right.to(panel)) for _, panel in _panels(matrix, torch.float32)]
    return torch.cat(parts)


def _turned_times(
    matrix: FrozenMatrix, left: Float[Tensor, "out size"]
) -> Float[Tensor, "in size"]:
    total = left.new_zeros(matrix.shape[1], left.shape[1])
    for first, panel in _panels(matrix, torch.float32):
        total.addmm_(panel.t(), left[first : first + panel.shape[0]])
    return total


# ---------------------------------------------------------------- parts


def _panels(matrix: FrozenMatrix, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, dense rows) of at most a panel's weights; a storage may hand out more."""
    rows = max(1, PANEL_WEIGHTS // matrix.shape[1])
    for first, panel in matrix.panels(dtype, rows):
        for start in range(0, panel.shape[0], rows):
            yield first + start, panel[start : start + rows]


def _signs(seed: int, name: str, side: Side, rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.from_numpy(signs(seed, name, side, rows, columns)).to(like.device).to(like.dtype)


def _added(total: Tensor | None, value: Tensor, factor: float) -> Tensor:
    if total is None:
        return value.mul_(factor) if factor != 1.0 else value
    return total.add_(value, alpha=factor)


def _or_zeros(total: Tensor | None, *shape: int) -> Tensor:
    return torch.zeros(shape) if total is None else total
