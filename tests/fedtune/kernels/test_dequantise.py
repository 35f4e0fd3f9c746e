"""Unpacking: every path gives the bits of an independent unpacker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from host import HostLauncher
from oracle import random_packed, values_of
from tolerances import DTYPES, off_by_one

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, launches, reference
from fedtune.kernels.packed import Bits

SHAPES = ((1, 1), (3, 85), (16, 16), (7, 1000), (130, 257))


def assert_same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    narrowed = torch.from_numpy(expected).to(found.dtype)
    assert torch.equal(found.cpu().view(torch.uint8), narrowed.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_path_gives_the_bits_of_the_oracle(
    device: torch.device, bits: Bits, block: int, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        packed, codes = random_packed(bits, block, shape)
        expected = values_of(packed, codes)[: packed.weights]
        out = torch.full((packed.weights,), float("nan"), dtype=dtype, device=device)
        assert dispatch.dequantise(packed.to(device), 0, out) is out
        assert_same_bits(out, expected)
        plain = reference.dequantise(packed.to(device), 0, torch.empty_like(out))
        assert_same_bits(plain, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_part_is_that_part_and_nothing_around_it_is_written(
    device: torch.device, bits: Bits
) -> None:
    packed, codes = random_packed(bits, 64, (20, 600))
    expected = values_of(packed, codes)
    packed = packed.to(device)
    for first, count in ((256, 1), (512, 777), (11776, 224), (0, 0)):
        for before in (0, 3):  # 3: an address that 16-byte stores cannot take
            room = torch.full((before + count + 9,), 7.0, dtype=torch.bfloat16, device=device)
            part = room[before : before + count]
            dispatch.dequantise(packed, first, part)
            assert_same_bits(part.clone(), expected[first : first + count])
            assert bool((room[:before] == 7).all())
            assert bool((room[before + count :] == 7).all())


def test_codes_may_start_at_any_address(host: HostLauncher) -> None:
    packed, codes = random_packed(8, 64, (3, 100))
    moved = replace(packed, codes=off_by_one(packed.codes))
    out = launches.dequantise(host, moved, 0, torch.empty(300))
    assert_same_bits(out, values_of(packed, codes)[:300])


@pytest.mark.parametrize("first", [100, -256, 512])
def test_a_part_outside_the_matrix_is_refused(host: HostLauncher, first: int) -> None:
    packed, _ = random_packed(4, 64, (2, 200))
    with pytest.raises(KernelError, match="multiple of 256, and the matrix has 400"):
        launches.dequantise(host, packed, first, torch.empty(256))


def test_other_dtypes_and_strides_are_refused(host: HostLauncher) -> None:
    packed, _ = random_packed(4, 64, (2, 200))
    with pytest.raises(KernelError, match=r"float32, bfloat16 or float16, got torch\.int32"):
        launches.dequantise(host, packed, 0, torch.empty(256, dtype=torch.int32))
    with pytest.raises(KernelError, match="out must be contiguous"):
        launches.dequantise(host, packed, 0, torch.empty(8, 8).t()[:, :4])
