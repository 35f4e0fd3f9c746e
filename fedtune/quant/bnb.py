"""bitsandbytes' own int8 and NF4, by name only: for comparison, and for what others quantised.

The library is imported when one of its formats is used, and not before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

from fedtune.errors import MissingExtraError
from fedtune.quant.panels import PANEL_ROWS, Panel
from fedtune.records import FormatName

NF4_BLOCK = 64
"""Weights that share one NF4 scale (QLoRA, section 3); scales are 8-bit in blocks of 256."""
_STATE = "quant_state."


@dataclass(frozen=True, slots=True)
class BnbInt8:
    """8-bit integers with one scale per output row (LLM.int8, vector-wise)."""

    codes: Int8[Tensor, "out in"]
    row_maxima: Float32[Tensor, " out"]
    format: FormatName = "bnb-int8"

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def bytes(self) -> int:
        return self.codes.numel() + 4 * self.row_maxima.numel()

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return self.codes.to(dtype).mul_((self.row_maxima / 127.0)[:, None])

    def panels(self, dtype: torch.dtype, rows: int = PANEL_ROWS) -> Iterator[Panel]:
        yield 0, self.values(dtype)

    def to(self, device: torch.device) -> BnbInt8:
        return BnbInt8(self.codes.to(device), self.row_maxima.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "row_maxima": self.row_maxima}

    def metadata(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class BnbNf4:
    """4-bit NormalFloat with double-quantised block scales (QLoRA, arXiv 2305.14314, section 3).

    Attributes:
        state: bitsandbytes' QuantState: scales and how they are quantised themselves.
    """

    codes: UInt8[Tensor, "bytes 1"]
    state: Any  # the library is untyped
    shape: tuple[int, int]
    format: FormatName = "bnb-nf4"

    @property
    def bytes(self) -> int:
        scales = self.state.absmax.numel() + self.state.state2.absmax.numel() * 4
        return int(self.codes.numel() + scales)

    def values(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        dense: Tensor = bitsandbytes_functional().dequantize_4bit(self.codes, self.state)
        return dense.reshape(self.shape).to(dtype)

    def panels(self, dtype: torch.dtype, rows: int = PANEL_ROWS) -> Iterator[Panel]:
        """The whole matrix: the library unpacks nothing less."""
        yield 0, self.values(dtype)

    def to(self, device: torch.device) -> BnbNf4:
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return restore_bnb_nf4(self.shape, tensors)

    def tensors(self) -> dict[str, Tensor]:
        parts = self.state.as_dict(packed=True)
        return {"codes": self.codes} | {_STATE + name: part for name, part in parts.items()}

    def metadata(self) -> dict[str, str]:
        return {}


def store_bnb_int8(weight: Float[Tensor, "out in"]) -> BnbInt8:
    """Quantise with bitsandbytes.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    functional = bitsandbytes_functional()
    codes, row_maxima, _ = functional.int8_vectorwise_quant(weight.detach().float().contiguous())
    return BnbInt8(codes, row_maxima)


def store_bnb_nf4(weight: Float[Tensor, "out in"]) -> BnbNf4:
    """Quantise with bitsandbytes, the matrix as one row of weights.

    Version 0.50.2 unpacks a matrix wrongly on CPUs with AVX-512 when a block spans two rows (288
    columns: relative error 0.25 for 0.09). As one row the codes are the same and it is right.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    codes, state = bitsandbytes_functional().quantize_4bit(
        weight.detach().float().reshape(1, -1),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        compress_statistics=True,
    )
    return BnbNf4(codes, state, (int(weight.shape[0]), int(weight.shape[1])))


def restore_bnb_int8(tensors: Mapping[str, Tensor]) -> BnbInt8:
    """The matrix whose `tensors()` these are."""
    return BnbInt8(tensors["codes"], tensors["row_maxima"])


def restore_bnb_nf4(shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> BnbNf4:
    """The matrix whose `tensors()` these are."""
    parts = {
        name.removeprefix(_STATE): part for name, part in tensors.items() if name.startswith(_STATE)
    }
    codes = tensors["codes"]
    state = bitsandbytes_functional().QuantState.from_dict(parts, device=codes.device)
    return BnbNf4(codes, state, shape)


def bitsandbytes_functional() -> Any:  # the library is untyped
    """The module of its operations.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    return import_bitsandbytes("a bnb-int8 or bnb-nf4 backbone").functional


def import_bitsandbytes(wanted_for: str) -> Any:  # the library is untyped
    """The library, without the notice of an absent hub kernel that its import logs.

    Raises:
        MissingExtraError: it is not installed.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtraError("bitsandbytes", "train", wanted_for) from None
    finally:
        logger.setLevel(level)
    return bitsandbytes
