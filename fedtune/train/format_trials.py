"""Which backbone formats run on a device: each is tried on a small matrix, none is taken on trust.

A trial does with the matrix what training does: hold it, multiply with it beside a low-rank pair,
and go back through it. A format passes if product and gradients are those of the dense matrix that
it stands for, and that matrix is near the one it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedtune.errors import FedtuneError
from fedtune.lora.linear import AdaptedLinear, Factors
from fedtune.quant.storage import StoredMatrix, store
from fedtune.records import BACKBONE_FORMATS, FormatName, MatrixForm

_OUT, _IN, _TOKENS, _RANK = 96, 288, 48, 4
"""Columns that no block size divides without the next row, and more rows than one panel of some."""
_STORAGE_ERROR: Final[Mapping[FormatName, float]] = {
    "fp32": 1e-7,
    "bf16": 4e-3,
    "fp16": 1e-3,
    "q8": 0.012,
    "int8": 0.02,
    "q4": 0.12,
    "nf4": 0.12,
    "q3": 0.25,
    "q2": 0.5,
    "bnb-int8": 0.02,
    "bnb-nf4": 0.12,
}
"""Largest error of the held matrix, relative to its norm. The formats lose between a quarter and
three quarters of that on normal weights (docs/formats.md)."""
_PRODUCT_ERROR: Final[Mapping[torch.dtype, float]] = {
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
"""Largest relative error of a product and of a gradient: some ten times the rounding of a dtype."""
_FAILURES = (
    FedtuneError,
    RuntimeError,  # torch's own, NotImplementedError among them
    ImportError,
    OSError,  # a shared library that cannot be loaded
    AttributeError,  # bitsandbytes without the function for this device
    TypeError,
    ValueError,
    AssertionError,
)
"""What a library that does not support a device raises; none of it is our own fault to hide."""

Store = Callable[[Tensor, MatrixForm], StoredMatrix]


@dataclass(frozen=True, slots=True)
class Trials:
    """Which formats passed, in the order of `BACKBONE_FORMATS`, and why the others did not."""

    formats: tuple[FormatName, ...]
    failed: Mapping[str, str]


def try_formats(
    device: torch.device,
    compute: torch.dtype,
    names: Sequence[FormatName] = BACKBONE_FORMATS,
    store: Store = store,
) -> Trials:
    """Try formats on a device, in the dtype that it computes in; about 0.1 s, and bitsandbytes'
    import.

    Args:
        store: holds a matrix in a form.
    """
    passed: list[FormatName] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            reason = _trial(name, device, compute, store)
        except _FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            failed[name] = _short(reason)
        else:
            passed.append(name)
    return Trials(tuple(passed), failed)


def _trial(name: FormatName, device: torch.device, compute: torch.dtype, store: Store) -> str:
    """Why the format does not do; empty: it does."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    weight = draw(_OUT, _IN)
    matrix = store(weight, MatrixForm(name))
    dense = matrix.values(torch.float32).clone()
    lost = _difference(dense, weight)
    if not lost <= _STORAGE_ERROR[name]:  # also where it is not a number
        return f"the held matrix is off by {lost:.2g} of its norm"
    x, a, b, outer = draw(_TOKENS, _IN), draw(_RANK, _IN), draw(_OUT, _RANK), draw(_TOKENS, _OUT)
    expected = _gradients(lambda x, a, b: x @ (dense + b @ a).t(), (x, a, b), outer, torch.float32)
    layer = AdaptedLinear(matrix, None)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        layer.factors = Factors(a, b, a.new_empty(0, _IN), b.new_empty(_OUT, 0), 1.0)
        return layer(x)  # type: ignore[no-any-return]  # torch's modules return Any

    found = _gradients(product, (x, a, b), outer, compute)
    parts = ("product", "gradient of its input", "gradient of A", "gradient of B")
    for part, one, other in zip(parts, found, expected, strict=True):
        off = _difference(one, other)
        if not off <= _PRODUCT_ERROR[compute]:
            return f"the {part} is off by {off:.2g} of its norm"
    return ""


def _gradients(
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    outer: Tensor,
    dtype: torch.dtype,
) -> list[Tensor]:
    """A product, and the gradients of its inputs; the factors are float32, as in training."""
    x, a, b = (part.clone() for part in inputs)
    x = x.to(dtype).requires_grad_()
    a.requires_grad_()
    b.requires_grad_()
    y = product(x, a, b)
    y.backward(outer.to(y.dtype))  # type: ignore[no-untyped-call]  # torch's
    gradients = [part.grad for part in (x, a, b)]
    return [y.detach(), *(g for g in gradients if g is not None)]


def _difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to the other's."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= 160 else f"{line[:157]}..."
