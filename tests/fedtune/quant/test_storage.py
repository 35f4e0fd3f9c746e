"""Frozen matrices: what they keep, and how near their values are to the original."""

from __future__ import annotations

import pytest
import torch

from fedtune.quant.storage import store
from fedtune.records import BACKBONE_FORMATS, FormatName

# Relative Frobenius errors of a Gaussian matrix; NF4 at block 64 has 0.092 (QLoRA's codebook).
LARGEST_ERROR: dict[FormatName, float] = {"fp32": 0.0, "bf16": 0.003, "int8": 0.012, "nf4": 0.1}
BITS: dict[FormatName, float] = {"fp32": 32.0, "bf16": 16.0, "int8": 8.25, "nf4": 4.2}


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
def test_values_are_within_the_error_of_the_format(
    weight: torch.Tensor, format_name: FormatName
) -> None:
    matrix = store(weight, format_name)
    values = matrix.values(torch.float32)
    assert matrix.shape == (96, 128)
    assert values.shape == weight.shape
    error = float((values - weight).norm() / weight.norm())
    assert error <= LARGEST_ERROR[format_name]


@pytest.mark.parametrize("format_name", ["bf16", "int8", "nf4"])
def test_a_narrow_format_is_not_exact(weight: torch.Tensor, format_name: FormatName) -> None:
    assert not torch.equal(store(weight, format_name).values(torch.float32), weight)


@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
def test_storage_keeps_the_bits_of_the_format(
    weight: torch.Tensor, format_name: FormatName
) -> None:
    bits = 8 * store(weight, format_name).bytes / weight.numel()
    assert bits <= BITS[format_name]
    assert bits >= {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}[format_name]


@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
def test_values_come_in_the_dtype_asked_for(weight: torch.Tensor, format_name: FormatName) -> None:
    assert store(weight, format_name).values(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65, 7)])
@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
def test_odd_shapes_survive(shape: tuple[int, int], format_name: FormatName) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    values = store(weight, format_name).values(torch.float32)
    assert values.shape == shape
    assert float((values - weight).norm() / weight.norm()) < 0.2
