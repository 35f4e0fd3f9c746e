"""Unpacking against the words of the layout, taken literally with numpy's bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.kernels import reference, unpack
from fedtune.kernels.packed import GROUP, SUPERBLOCK, Bits, PackedWeights, padded
from fedtune.kernels.unpack import dequantise

WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)


def random_packed(bits: Bits, shape: tuple[int, int], block: int = 64) -> PackedWeights:
    generator = torch.Generator().manual_seed(bits)
    row = padded(shape[0] * shape[1])
    blocks = row // block

    def random_bytes(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    return PackedWeights(
        codes=random_bytes(row * bits // 8),
        scale_codes=random_bytes(blocks),
        scale_steps=torch.rand(-(-blocks // SUPERBLOCK), generator=generator),
        scale_offset=torch.rand((), generator=generator),
        codebook=torch.randn(2**bits, generator=generator).sort().values,
        bits=bits,
        block=block,
        shape=shape,
    )


def by_the_words(packed: PackedWeights) -> np.ndarray:
    """The padded row in float32, bit by bit as the layout's docstring has it."""
    row = padded(packed.weights)
    planes = np.unpackbits(packed.codes.numpy())
    if packed.bits == 3:
        low, high = planes[: 2 * row].reshape(row, 2), planes[2 * row :].reshape(row, 1)
        bits = np.concatenate([high, low], axis=1)
    else:
        bits = planes.reshape(row, packed.bits)
    codes = bits.astype(np.int64) @ (1 << np.arange(packed.bits)[::-1])
    steps = np.repeat(packed.scale_steps.numpy(), SUPERBLOCK)[: packed.scale_codes.numel()]
    product = packed.scale_codes.numpy().astype(np.float32) * steps
    scales = np.repeat(product + packed.scale_offset.numpy(), packed.block)
    return packed.codebook.numpy()[codes] * scales


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (16, 16), (257, 129), (700, 65)])
def test_every_bit_is_where_the_layout_says(bits: Bits, block: int, shape: tuple[int, int]) -> None:
    packed = random_packed(bits, shape, block)
    found = dequantise(packed, 0, torch.empty(shape))
    expected = by_the_words(packed)[: packed.weights].reshape(shape)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert torch.equal(reference.dequantise(packed, 0, torch.empty(shape)), found)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_the_float32_value_rounded_once(bits: Bits, dtype: torch.dtype) -> None:
    packed = random_packed(bits, (100, 37))
    wide = dequantise(packed, 0, torch.empty(100, 37))
    narrow = dequantise(packed, 0, torch.empty(100, 37, dtype=dtype))
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 31, 256, 1000, 5000])
def test_a_part_is_that_part_of_the_whole(bits: Bits, block: int, length: int) -> None:
    # 33 groups: parts begin inside a superblock of scales and inside the second one.
    packed = random_packed(bits, (33, GROUP), block)
    expected = torch.from_numpy(by_the_words(packed))
    for first in (0, GROUP, 5 * GROUP, 13 * GROUP):
        found = dequantise(packed, first, torch.empty(length))
        assert torch.equal(found, expected[first : first + length])


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_large_part_is_unpacked_in_chunks(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(bits, (40, 111))
    whole = dequantise(packed, 0, torch.empty(40, 111))
    monkeypatch.setattr(unpack, "CHUNK", 2 * GROUP)
    assert torch.equal(dequantise(packed, 0, torch.empty(40, 111)), whole)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_result_may_lie_anywhere_in_memory(bits: Bits) -> None:
    packed = random_packed(bits, (8, 64))
    expected = dequantise(packed, 0, torch.empty(512))
    for offset in (1, 2, 3, 4):
        out = torch.zeros(512 + offset)[offset:]
        assert dequantise(packed, 0, out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_may_begin_at_an_odd_byte(bits: Bits) -> None:
    packed = random_packed(bits, (8, 64))
    codes = torch.cat([packed.codes.new_zeros(1), packed.codes])[1:]
    found = dequantise(replace(packed, codes=codes), 0, torch.empty(512))
    assert torch.equal(found, dequantise(packed, 0, torch.empty(512)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_matrix_has_no_values(bits: Bits, shape: tuple[int, int]) -> None:
    assert dequantise(random_packed(bits, shape), 0, torch.empty(shape)).numel() == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_inference_mode_left_behind_can_be_used_outside_of_it(bits: Bits) -> None:
    packed = random_packed(bits, (8, 64))
    with torch.inference_mode():
        inside = dequantise(packed, 0, torch.empty(512)).clone()
    assert torch.equal(dequantise(packed, 0, torch.empty(512)), inside)


def test_a_part_begins_at_a_whole_group() -> None:
    with pytest.raises(AssertionError, match="a multiple of 256, not at 128"):
        dequantise(random_packed(4, (2, 256)), 128, torch.empty(64))
