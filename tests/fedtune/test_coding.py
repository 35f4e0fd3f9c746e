"""Blocks of a tensor: how it is cut, and what that takes."""

from __future__ import annotations

import math

import pytest

from fedtune.coding import BLOCK, CODECS, block_axis, blocks_of, coded_bytes


@pytest.mark.parametrize(
    ("shape", "axis"), [((8, 64), 1), ((64, 8), 0), ((8, 8), 0), ((5,), 0), ((), 0), ((2, 3, 3), 1)]
)
def test_blocks_lie_along_the_longest_axis(shape: tuple[int, ...], axis: int) -> None:
    assert block_axis(shape) == axis


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 172, 4096, 11008])
def test_blocks_of_a_row_are_of_one_length_and_waste_less_than_one_number_each(length: int) -> None:
    cut = blocks_of((3, length)) if length >= 3 else blocks_of((length,))
    assert cut.length <= BLOCK
    assert length <= cut.count * cut.length < length + cut.count


@pytest.mark.parametrize(
    ("codec", "bits"),
    [("fp32", 32), ("fp16", 16), ("bf16", 16), ("int8", 8.25), ("q4", 4.25), ("q3", 3.25)],
)
def test_bits_of_a_number_with_its_part_of_the_scale(codec: str, bits: float) -> None:
    assert coded_bytes(codec, (16, 4096)) * 8 == bits * 16 * 4096  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_a_tensor_without_numbers_takes_no_bytes(codec: str, shape: tuple[int, ...]) -> None:
    assert math.prod(shape) == coded_bytes(codec, shape) == 0  # type: ignore[arg-type]
