"""Attention over a packed row is attention over each sample by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedtune.model import attention as module
from fedtune.model.attention import packed_attention, segments

CPU = torch.device("cpu")
LENGTHS = (9, 4, 4, 4, 1, 6)


def heads(
    heads: int = 4, kv_heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(sum(LENGTHS), count, dim, generator=generator).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def apart(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """The formula, written out, one sample after the other."""
    found = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        if cap is not None:
            scores = (scores / cap).tanh() * cap
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
        hidden = (distance < 0) | (distance >= (window or len(q)))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v.float()))
    return torch.cat(found)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 9, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_samples_do_not_see_each_other(
    kv_heads: int, window: int | None, cap: float | None
) -> None:
    parts = heads(kv_heads=kv_heads)
    expected = apart(*parts, 0.4, window, cap)
    found = packed_attention(*parts, segments(LENGTHS, CPU), 0.4, window, cap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    slopes = torch.autograd.grad(expected, parts, direction)
    ours = torch.autograd.grad(found, parts, direction)
    torch.testing.assert_close(ours, slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_plain_calls_give_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = heads()
    where = segments(LENGTHS, CPU)
    found = module._each_run(module._plain, *parts, where, 0.4, window, None)
    torch.testing.assert_close(found, apart(*parts, 0.4, window, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    parts = heads(dtype=dtype)
    found = packed_attention(*parts, segments(LENGTHS, CPU), 0.4)
    assert found.dtype == dtype
    expected = apart(*parts, 0.4, None, None)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_neighbours_of_equal_length_are_one_run() -> None:
    assert list(segments(LENGTHS, CPU).runs()) == [
        (0, 1, 9), (9, 3, 4), (21, 1, 1), (22, 1, 6)
    ]  # fmt: skip


def test_bounds_are_known_to_host_and_device() -> None:
    where = segments((3, 5), CPU)
    assert where.lengths == (3, 5)
    assert where.longest == 5
    assert where.offsets.tolist() == [0, 3, 8]
    assert where.offsets.dtype == torch.int32


def test_only_inputs_result_and_sums_are_kept() -> None:
    parts = heads(heads=4, kv_heads=2, dim=8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_attention(*parts, segments(LENGTHS, CPU), 0.4)
    tokens = sum(LENGTHS)
    assert sum(t.numel() for t in kept) == tokens * 8 * (4 + 2 + 2 + 4) + tokens * 4


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_gives_the_same(dtype: torch.dtype, window: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    parts = heads(dtype=dtype)
    expected = apart(*parts, 0.4, window, None)
    there = [x.detach().cuda().requires_grad_() for x in parts]
    found = packed_attention(*there, segments(LENGTHS, torch.device("cuda")), 0.4, window)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    slopes = torch.autograd.grad(expected.sum(), parts)
    ours = torch.autograd.grad(found.float().sum(), there)
    for one, other in zip(ours, slopes, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=5 * tolerance, atol=5 * tolerance)
