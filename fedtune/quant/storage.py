"""How a frozen weight matrix is held, and how its values come back for a product.

Four formats behind one small interface: `values(dtype)` gives the dense matrix for the duration of
one product, `bytes` says what the storage keeps. bitsandbytes does the NF4 and int8 arithmetic;
the matrix product itself lives in `fedtune.lora.linear`, so that a fused kernel can replace both.
"""

from __future__ import annotations

import logging
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.errors import MissingExtraError
from fedtune.records import FormatName

NF4_BLOCK = 64
"""Weights that share one NF4 scale (QLoRA, section 3); scales are 8-bit in blocks of 256."""


class DenseMatrix:
    """fp32 or bf16 storage. bf16 is storage only: products run in the dtype that is asked for.

    CPUs without a bf16 instruction set multiply bf16 matrices tens of times slower than fp32.
    """

    def __init__(self, weight: Float[Tensor, "out in"], format_name: FormatName) -> None:
        self.format: FormatName = format_name
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[format_name]
        self._weight = weight.detach().to(dtype)
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self._weight.to(dtype)

    @property
    def bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()

    def to(self, device: torch.device) -> DenseMatrix:
        self._weight = self._weight.to(device)
        return self


class Int8Matrix:
    """8-bit integers with one scale per output row (LLM.int8, vector-wise)."""

    format: FormatName = "int8"

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        functional = _bitsandbytes()
        self._codes, self._row_maxima, _ = functional.int8_vectorwise_quant(
            weight.detach().float().contiguous()
        )
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        dense: Tensor = self._codes.to(dtype)
        return dense.mul_((self._row_maxima / 127.0).to(dtype)[:, None])

    @property
    def bytes(self) -> int:
        return int(self._codes.numel() + self._row_maxima.numel() * 4)

    def to(self, device: torch.device) -> Int8Matrix:
        self._codes, self._row_maxima = self._codes.to(device), self._row_maxima.to(device)
        return self


class Nf4Matrix:
    """4-bit NormalFloat with double-quantised block scales (QLoRA, arXiv 2305.14314, section 3)."""

    format: FormatName = "nf4"

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        self._functional = _bitsandbytes()
        self._codes, self._state = self._functional.quantize_4bit(
            weight.detach().float().contiguous(),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            compress_statistics=True,
        )
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        dense: Tensor = self._functional.dequantize_4bit(self._codes, self._state)
        return dense.to(dtype)

    @property
    def bytes(self) -> int:
        nested = self._state.state2
        scales = self._state.absmax.numel() + nested.absmax.numel() * 4
        return int(self._codes.numel() + scales)

    def to(self, device: torch.device) -> Nf4Matrix:
        self._codes = self._codes.to(device)
        self._state.to(device)
        return self


StoredMatrix: TypeAlias = DenseMatrix | Int8Matrix | Nf4Matrix


def store(weight: Float[Tensor, "out in"], format_name: FormatName) -> StoredMatrix:
    """Hold a weight matrix in a format.

    Raises:
        MissingExtraError: the format needs bitsandbytes and it is not installed.
    """
    if format_name == "nf4":
        return Nf4Matrix(weight)
    if format_name == "int8":
        return Int8Matrix(weight)
    return DenseMatrix(weight, format_name)


def _bitsandbytes() -> Any:  # the library is untyped
    # Its import logs that an optional hub kernel is absent; that is no news to a user.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError:
        raise MissingExtraError("bitsandbytes", "train", "an int8 or nf4 backbone") from None
    finally:
        logger.setLevel(level)
    return bitsandbytes.functional
