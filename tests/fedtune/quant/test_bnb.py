"""bitsandbytes' NF4 under its own name, for matrices of any width."""

from __future__ import annotations

import pytest
import torch

from fedtune.quant.storage import store
from fedtune.records import MatrixForm


@pytest.mark.parametrize("columns", [64, 100, 288])
def test_a_block_that_spans_two_rows_is_unpacked_right(columns: int) -> None:
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    held = store(weight, MatrixForm("bnb-nf4")).values(torch.float32)
    assert held.shape == weight.shape
    assert float((held - weight).norm() / weight.norm()) < 0.1
