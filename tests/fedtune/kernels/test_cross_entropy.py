"""Cross-entropy in place: losses and gradients of the plain formula, in every path."""

from __future__ import annotations

import pytest
import torch
from host import HostLauncher
from tolerances import DTYPES, assert_near, off_by_one, random, wide
from torch.nn import functional

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, launches

SHAPES = ((1, 1), (3, 7), (5, 32), (4, 1003), (2, 50257), (7, 4096))


def targets_of(rows: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (rows,), generator=generator).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_those_of_autograd(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits = random(*shape, dtype=dtype, device=device, scale=4.0)
    targets = targets_of(*shape, device)
    weights = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)).to(device)
    leaf = wide(logits)
    expected = functional.cross_entropy(leaf, targets, reduction="none")
    (expected * weights).sum().backward()

    losses = dispatch.softmax_cross_entropy_(logits, targets, weights)
    assert losses.dtype == torch.float32
    assert_near(losses, expected.detach(), absolute=1e-5)
    assert leaf.grad is not None
    assert_near(logits, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_start_at_any_address_and_lie_apart(
    device: torch.device, dtype: torch.dtype
) -> None:
    dense = random(3, 101, dtype=dtype, device=device)
    targets, weights = targets_of(3, 101, device), torch.ones(3, device=device)
    room = torch.full((3, 110), 7.0, dtype=dtype, device=device)
    apart, shifted = room[:, 3:104], off_by_one(dense)
    apart.copy_(dense)
    losses = dispatch.softmax_cross_entropy_(dense, targets, weights)
    for logits in (apart, shifted):
        assert_near(dispatch.softmax_cross_entropy_(logits, targets, weights), losses.double())
        assert_near(logits, dense.double(), absolute=1e-5)
    assert bool((room[:, :3] == 7).all())
    assert bool((room[:, 104:] == 7).all())


def test_a_row_without_a_target_has_no_loss_and_no_gradient(device: torch.device) -> None:
    logits = random(4, 50, dtype=torch.float32, device=device)
    targets = torch.tensor([3, -100, 50, 7], device=device)
    losses = dispatch.softmax_cross_entropy_(logits, targets, torch.ones(4, device=device))
    assert losses[1:3].tolist() == [0.0, 0.0]
    assert float(losses[0]) > 0
    assert not bool(logits[1:3].any())
    assert bool(logits[0].any())


def test_a_row_of_weight_zero_has_no_gradient_whatever_its_logits(device: torch.device) -> None:
    logits = random(3, 50, dtype=torch.float32, device=device)
    logits[1], logits[2, 5] = -torch.inf, torch.nan
    targets, weights = torch.tensor([1, 2, 3], device=device), torch.zeros(3, device=device)
    losses = dispatch.softmax_cross_entropy_(logits, targets, weights)
    assert not bool(logits.any())  # not a number is true
    assert float(losses[0]) > 0
    assert bool(losses[1:].isnan().all())


def test_logits_of_minus_infinity_have_no_share(device: torch.device) -> None:
    logits = random(2, 300, dtype=torch.float32, device=device)
    masked = logits.clone()
    masked[:, 100:] = -torch.inf
    targets, weights = torch.tensor([5, 99], device=device), torch.ones(2, device=device)
    short = logits[:, :100].clone()
    losses = dispatch.softmax_cross_entropy_(masked, targets, weights)
    assert_near(losses, dispatch.softmax_cross_entropy_(short, targets, weights).double())
    assert not bool(masked[:, 100:].any())
    assert_near(masked[:, :100], short.double())


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    logits = torch.full((1, 64), -30000.0, device=device)
    logits[0, 9] = 30000.0
    targets, weights = torch.tensor([9], device=device), torch.ones(1, device=device)
    assert float(dispatch.softmax_cross_entropy_(logits, targets, weights)) == 0.0
    assert bool((logits == 0).all())


@pytest.mark.parametrize("shape", [(0, 10), (0, 0)])
def test_no_rows_have_no_losses(device: torch.device, shape: tuple[int, int]) -> None:
    nothing = torch.empty(0, device=device)
    losses = dispatch.softmax_cross_entropy_(
        torch.empty(shape, device=device), nothing.long(), nothing
    )
    assert losses.shape == (0,)


def test_wrong_shapes_and_strides_are_refused(host: HostLauncher) -> None:
    logits, one = torch.empty(2, 4), torch.ones(1)
    with pytest.raises(KernelError, match="2 rows of logits need as many targets and weights"):
        launches.softmax_cross_entropy_(host, logits, one.long(), one)
    with pytest.raises(KernelError, match="rows of logits must be dense"):
        launches.softmax_cross_entropy_(
            host, torch.empty(4, 2).t(), torch.zeros(2).long(), torch.ones(2)
        )
