"""Many devices in one pass: the gradients are right, and nobody's numbers depend on the others."""

from __future__ import annotations

import pytest
import torch

from fedtune.kernels.low_rank import groups_of
from fedtune.lora.grouped import grouped_update

CPU = torch.device("cpu")
COUNTS, RANKS, SCALES = (
    (12, 12, 0, 33, 1, 33, 33),
    (4, 4, 3, 16, 0, 8, 8),
    (2.0, 2, 1, 0.5, 1, 1, 1),
)


def test_the_gradients_are_those_of_the_definition() -> None:
    counts, ranks, scales = (3, 0, 4, 4), (2, 1, 0, 3), (2.0, 1.0, 1.0, 0.5)
    groups = groups_of(counts, ranks, scales, CPU)
    generator = torch.Generator().manual_seed(0)
    y, x, a, b = (
        torch.randn(rows, columns, generator=generator, dtype=torch.float64, requires_grad=True)
        for rows, columns in ((11, 5), (11, 7), (6, 7), (6, 5))
    )

    # Gradients of factors pass through float32, so the finite differences get its tolerance.
    def update(*given: torch.Tensor) -> torch.Tensor:
        return grouped_update(given[0].clone(), *given[1:], groups)

    assert torch.autograd.gradcheck(update, (y, x, a, b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_device_gets_the_bits_that_it_gets_alone(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _assert_same_bits_alone(dtype)
    finally:
        torch.set_num_threads(before)


def _assert_same_bits_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, rank, columns, out = sum(COUNTS), sum(RANKS), 64, 176
    y = torch.randn(tokens, out, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    gradient = torch.randn(tokens, out, generator=generator).to(dtype)
    a, b = torch.randn(rank, columns), torch.randn(rank, out)

    def run(rows: slice, mine: slice, form: tuple[slice, ...]) -> list[torch.Tensor]:
        (only,) = form
        groups = groups_of(COUNTS[only], RANKS[only], SCALES[only], CPU)
        leaves = [t.clone().requires_grad_() for t in (x[rows], a[mine], b[mine])]
        result = grouped_update(y[rows].clone(), *leaves, groups)
        result.backward(gradient[rows])
        return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    together = run(slice(0, tokens), slice(0, rank), (slice(0, len(COUNTS)),))
    token = row = 0
    for i, (count, own) in enumerate(zip(COUNTS, RANKS, strict=True)):
        rows, mine = slice(token, token + count), slice(row, row + own)
        alone = run(rows, mine, (slice(i, i + 1),))
        for whole, part, where in zip(together, alone, (rows, rows, mine, mine), strict=True):
            assert torch.equal(whole[where], part)
        token, row = token + count, row + own
