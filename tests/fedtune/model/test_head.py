"""Chunked loss and gradient are those of autograd, and no logits are kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.model import head as module
from fedtune.model.head import Head, chunk_rows, frozen_head, head_loss

TOKENS, HIDDEN, VOCABULARY = 23, 8, 50
ROWS = torch.tensor([0, 3, 4, 9, 11, 17, 22])


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    targets = torch.randint(VOCABULARY, (len(ROWS),), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype), targets


def plain(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Losses of the rows, over autograd."""
    logits = functional.linear(hidden[ROWS], head.weight, head.bias)
    if head.softcap is not None:
        logits = (logits / head.softcap).tanh() * head.softcap
    return functional.cross_entropy(logits.float(), targets, reduction="none")


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 3)


@pytest.mark.usefixtures("chunks_of_three")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)],
    ids=str,
)
def test_loss_and_gradient_are_those_of_autograd(
    softcap: float | None, with_bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, bias, targets = problem(dtype)
    head = Head(weight, bias if with_bias else None, softcap)
    expected = plain(hidden, head, targets).sum()
    (slope,) = torch.autograd.grad(expected, hidden)
    found = head_loss(hidden, head, ROWS, targets)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(expected.item(), rel=tolerance)
    (ours,) = torch.autograd.grad(found.total, hidden)
    torch.testing.assert_close(ours, slope, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("chunks_of_three")
def test_weights_and_what_comes_after_multiply_the_gradient() -> None:
    hidden, weight, _, targets = problem()
    weights = torch.linspace(0.0, 2.0, len(ROWS))
    (slope,) = torch.autograd.grad(
        (plain(hidden, Head(weight), targets) * weights).sum() * 7, hidden
    )
    total = head_loss(hidden, Head(weight), ROWS, targets, weights).total
    (once,) = torch.autograd.grad(total * 7, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(total * 7, hidden)
    torch.testing.assert_close(once, slope, rtol=1e-5, atol=1e-6)
    assert torch.equal(once, again)


def test_small_weights_do_not_push_float16_gradients_to_zero() -> None:
    hidden, weight, _, targets = problem(torch.float16)
    weights = torch.full((len(ROWS),), 1e-7)
    total = head_loss(hidden, Head(weight), ROWS, targets, weights).total
    (slope,) = torch.autograd.grad(total * 1e7, hidden)
    (unweighted,) = torch.autograd.grad(
        head_loss(hidden, Head(weight), ROWS, targets).total, hidden
    )
    torch.testing.assert_close(slope, unweighted, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("chunks_of_three")
def test_hits_are_the_rows_whose_target_has_the_highest_logit() -> None:
    hidden, weight, _, targets = problem()
    best = (hidden[ROWS] @ weight.t()).argmax(-1)
    targets[[1, 4]] = best[[1, 4]]
    assert int(head_loss(hidden, Head(weight), ROWS, targets).hits) == int((best == targets).sum())


@pytest.mark.usefixtures("chunks_of_three")
def test_nothing_of_the_size_of_logits_is_kept() -> None:
    hidden, weight, _, targets = problem()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        head_loss(hidden, Head(weight), ROWS, targets)
    assert sum(t.numel() for t in kept) == len(ROWS) * (HIDDEN + 1)  # gradients and row numbers


def test_rows_without_loss_have_no_gradient() -> None:
    hidden, weight, _, targets = problem()
    (slope,) = torch.autograd.grad(head_loss(hidden, Head(weight), ROWS, targets).total, hidden)
    others = [i for i in range(TOKENS) if i not in ROWS.tolist()]
    assert not slope[others].any()
    assert slope[ROWS].any(dim=1).all()


def test_a_chunk_holds_32_mib_of_logits_or_128_rows() -> None:
    assert chunk_rows(2048, 4, "cpu") == 4096
    assert chunk_rows(128_000, 4, "cpu") == 128
    assert chunk_rows(128_000, 2, "cuda") == math.floor(2**27 / 256_000)


def test_a_head_that_is_trained_or_no_linear_layer_is_left_to_autograd() -> None:
    layer = nn.Linear(4, 9).requires_grad_(False)
    found = frozen_head(layer, softcap=2.0)
    assert found is not None
    assert found.weight is layer.weight
    assert found.bias is layer.bias
    assert found.softcap == 2.0
    for parameter in (layer.weight, layer.bias):
        parameter.requires_grad_(True)
        assert frozen_head(layer) is None
        parameter.requires_grad_(False)
    assert frozen_head(nn.Sequential(layer)) is None
