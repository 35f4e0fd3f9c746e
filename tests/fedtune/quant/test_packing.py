from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.kernels.packed import Bits
from fedtune.quant.packing import pack_codes


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [1, 2, 3, 4, 5, 6, 7, 255], [1, 2, 3, 4, 5, 6, 7, 255]),
        (4, [1, 2, 3, 4, 5, 6, 7, 15], [0x12, 0x34, 0x56, 0x7F]),
        (2, [0, 1, 2, 3, 3, 3, 0, 0], [0b00011011, 0b11110000]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b00011011, 0b00011011, 0b00001111]),
    ],
)
def test_bytes_by_hand(bits: Bits, codes: list[int], expected: list[int]) -> None:
    out = torch.zeros(len(expected), dtype=torch.uint8)
    pack_codes(torch.tensor(codes, dtype=torch.uint8), bits, out)
    assert out.tolist() == expected


@given(
    bits=st.sampled_from([2, 3, 4, 8]), eights=st.integers(1, 20), cut=st.integers(0, 20),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_row_packed_in_two_parts_is_the_row_packed_at_once(
    bits: Bits, eights: int, cut: int, seed: int
) -> None:
    n, cut = 8 * eights, 8 * min(cut, eights)
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 2**bits, n).astype(np.uint8))
    whole, parts = torch.zeros(2, n * bits // 8, dtype=torch.uint8)
    pack_codes(codes, bits, whole)
    pack_codes(codes[:cut], bits, parts, 0)
    pack_codes(codes[cut:], bits, parts, cut)
    assert torch.equal(whole, parts)
