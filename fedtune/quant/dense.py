"""Matrices held number by number: floats as they are, or integers with one scale per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.quant.panels import PANEL_ROWS, Panel, empty_panels
from fedtune.records import FormatName

DTYPES: dict[FormatName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_LARGEST_CODE = 127
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """fp32, bf16 or fp16 storage. It is storage only: products run in the dtype asked for.

    CPUs without a bf16 instruction set multiply bf16 matrices tens of times slower than fp32.
    """

    format: FormatName
    weight: Float[Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    @property
    def bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self.weight.to(dtype)

    def panels(self, dtype: torch.dtype, rows: int = PANEL_ROWS) -> Iterator[Panel]:
        if dtype == self.weight.dtype:
            yield 0, self.weight
            return
        for first, panel in empty_panels(self.shape, dtype, self.weight.device, rows):
            yield first, panel.copy_(self.weight[first : first + panel.shape[0]])

    def to(self, device: torch.device) -> DenseMatrix:
        return DenseMatrix(self.format, self.weight.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def metadata(self) -> dict[str, str]:
        return {}


def store_dense(weight: Float[Tensor, "out in"], format_name: FormatName) -> DenseMatrix:
    """Hold a matrix in a float dtype; without a copy where it has that dtype already.

    Raises:
        ModelError: a weight is beyond the range of fp16.
    """
    held = weight.detach().to(DTYPES[format_name])
    if held.dtype == torch.float16 and not bool(torch.isfinite(held).all()):
        raise ModelError(
            f"a matrix of shape {tuple(weight.shape)} holds weights beyond fp16's 65504; choose "
            "the format bf16"
        )
    return DenseMatrix(format_name, held)


def restore_dense(format_name: FormatName, tensors: Mapping[str, Tensor]) -> DenseMatrix:
    """The matrix whose `tensors()` these are."""
    return DenseMatrix(format_name, tensors["weight"])


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """8-bit integers with one scale per output row: weight = code * scale.

    Source: vector-wise quantisation of Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2;
    without its outlier columns.
    """

    codes: Int8[Tensor, "out in"]
    scales: Float32[Tensor, " out"]
    format: FormatName = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def bytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        # A code is exact in every dtype, and the product is rounded once.
        return self.codes.to(dtype).mul_(self.scales[:, None])

    def panels(self, dtype: torch.dtype, rows: int = PANEL_ROWS) -> Iterator[Panel]:
        for first, panel in empty_panels(self.shape, dtype, self.codes.device, rows):
            last = first + panel.shape[0]
            panel.copy_(self.codes[first:last]).mul_(self.scales[first:last, None])
            yield first, panel

    def to(self, device: torch.device) -> Int8Matrix:
        return Int8Matrix(self.codes.to(device), self.scales.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def metadata(self) -> dict[str, str]:
        return {}


def store_int8(weight: Float[Tensor, "out in"]) -> Int8Matrix:
    """Round each row to 255 steps between minus and plus its largest magnitude.

    Raises:
        ModelError: a weight is not finite.
    """
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.zeros(weight.shape[0], device=weight.device)
    for first in range(0, weight.shape[0] if weight.numel() else 0, _ROWS_AT_A_TIME):
        part = weight[first : first + _ROWS_AT_A_TIME].float()
        scale = part.abs().amax(dim=1) / _LARGEST_CODE
        if not bool(torch.isfinite(scale).all()):
            raise ModelError(
                f"a matrix of shape {tuple(weight.shape)} holds weights that are not finite "
                "numbers; choose a base model whose weights are whole"
            )
        scales[first : first + part.shape[0]] = scale
        safe = scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes[first : first + part.shape[0]] = (part / safe).round_().to(torch.int8)
    return Int8Matrix(codes, scales)


def restore_int8(tensors: Mapping[str, Tensor]) -> Int8Matrix:
    """The matrix whose `tensors()` these are."""
    return Int8Matrix(tensors["codes"], tensors["scales"])
