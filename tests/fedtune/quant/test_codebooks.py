"""Codebooks against bitsandbytes, against their derivation, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.kernels.packed import Bits
from fedtune.quant.codebooks import BLOCKS, codebooks, lloyd_max, normal_float
from fedtune.quant.lloyd_max import lloyd_max_levels


def test_four_bit_normal_float_is_bitsandbytes_nf4() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(normal_float(4), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_ascends_from_minus_one_to_one_through_zero(bits: Bits) -> None:
    levels = normal_float(bits)
    assert levels.shape == (2**bits,)
    assert bool((levels.diff() > 0).all())
    assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_shipped_levels_are_those_of_the_derivation(bits: Bits, block: int) -> None:
    derived = lloyd_max_levels(bits, block, cells=4096, nodes=300)
    levels = lloyd_max(bits, block)
    np.testing.assert_allclose(levels[2 ** (bits - 1) :].numpy(), derived, atol=2e-5)
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", BLOCKS)
def test_no_level_can_be_moved_to_lower_the_error_on_gaussian_blocks(
    bits: Bits, block: int
) -> None:
    """Each level is the mean of what falls to it: Lloyd's condition, on drawn weights."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1 << 20, generator=generator).view(-1, block)
    scales = weights.abs().amax(dim=1, keepdim=True)
    levels = lloyd_max(bits, block)
    codes = torch.bucketize(weights / scales, (levels[1:] + levels[:-1]) / 2).view(-1)
    importance = (scales**2).expand_as(weights).reshape(-1)
    total = torch.zeros(len(levels)).index_add_(0, codes, importance)
    moment = (importance * (weights / scales).view(-1)).contiguous()
    mean = torch.zeros(len(levels)).index_add_(0, codes, moment) / total
    torch.testing.assert_close(mean, levels, rtol=0, atol=3e-3)


def test_eight_bits_have_normal_float_only() -> None:
    assert list(codebooks(8, 64)) == ["normal-float"]
    assert list(codebooks(3, 64)) == ["normal-float", "lloyd-max"]
