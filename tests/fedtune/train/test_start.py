"""Fresh directions point where they are told, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedtune.lora.linear import Factors
from fedtune.records import StartName
from fedtune.train.start import corda, eva, leading_rows, pissa, point_fresh

OUT, IN = 24, 40
STARTS: tuple[StartName, ...] = ("eva", "pissa", "corda")
NONE = torch.zeros(0, IN)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def factors(warm: int, fresh: int, tail: int = 0) -> Factors:
    a = torch.linalg.qr(random(IN, warm + fresh + tail)).Q.t().contiguous()
    b = torch.cat([random(OUT, warm, seed=1), torch.zeros(OUT, fresh)], dim=1)
    return Factors(
        a[: warm + fresh].clone().requires_grad_(),
        b.requires_grad_(),
        a[warm + fresh :].clone(),
        random(OUT, tail, seed=2),
        0.5,
    )


def pointed(pair: Factors, start: StartName, weight: Tensor, x: Tensor) -> Factors:
    point_fresh({"w": pair}, start, lambda _: weight, {"w": x}, seed=0)
    return pair


@pytest.mark.parametrize("start", STARTS)
def test_the_product_and_the_directions_sent_stay_bit_for_bit(start: StartName) -> None:
    pair = factors(warm=3, fresh=4, tail=2)
    a, b, tail = pair.a.detach().clone(), pair.b.detach().clone(), pair.tail_a.clone()
    pointed(pair, start, random(OUT, IN), random(100, IN, seed=3))
    assert torch.equal(pair.b, b)
    assert torch.equal(pair.a[:3], a[:3])
    assert torch.equal(pair.tail_a, tail)
    assert torch.equal(pair.b @ pair.a, b @ a)
    assert not torch.isclose(pair.a[3:], a[3:]).all(dim=1).any()


@pytest.mark.parametrize("start", STARTS)
def test_fresh_rows_have_norm_one_and_leave_out_what_was_sent(start: StartName) -> None:
    pair = factors(warm=3, fresh=4, tail=2)
    pointed(pair, start, random(OUT, IN), random(100, IN, seed=3))
    fresh = pair.a[3:].detach()
    assert fresh.norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    known = torch.cat([pair.a[:3].detach(), pair.tail_a])
    assert (fresh @ known.t()).abs().max() < 1e-4


@pytest.mark.parametrize("find", [eva, lambda x, rank, known: pissa(x, rank, known, generator())])
def test_eva_and_pissa_give_the_leading_right_singular_vectors(
    find: Callable[[Tensor, int, Tensor], Tensor],
) -> None:
    x = random(60, IN) * torch.logspace(0, -2, IN)
    found = find(x, 3, NONE)
    expected = torch.linalg.svd(x).Vh[:3]
    assert (found @ expected.t()).abs().diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-3)


def test_corda_gives_the_directions_of_the_oriented_weights() -> None:
    """With V^T C^-1 for A, the best rank-k part of W C is kept after C is taken out again."""
    weight, x = random(OUT, IN), random(4000, IN, seed=1) * torch.logspace(0, -1, IN)
    found = corda(weight, x, 3, NONE, generator())
    covariance = x.t() @ x / len(x)
    covariance += 1e-2 * covariance.diagonal().mean() * torch.eye(IN)
    expected = torch.linalg.svd(weight @ covariance).Vh[:3] @ torch.linalg.inv(covariance)
    expected = torch.nn.functional.normalize(expected, dim=1)
    assert (found * expected).sum(dim=1).abs().tolist() == pytest.approx([1.0] * 3, abs=1e-3)
    plain = pissa(weight, 3, NONE, generator())
    assert (found * plain).sum(dim=1).abs().max() < 0.9


def test_inputs_of_low_rank_leave_the_other_fresh_rows_as_sent() -> None:
    pair = factors(warm=0, fresh=4)
    before = pair.a.detach().clone()
    pointed(pair, "eva", random(OUT, IN), random(50, 2) @ random(2, IN, seed=1))
    assert torch.equal(pair.a[2:], before[2:])
    assert not torch.isclose(pair.a[:2], before[:2]).all(dim=1).any()


@pytest.mark.parametrize("start", STARTS)
def test_a_matrix_without_fresh_directions_is_not_looked_at(start: StartName) -> None:
    def unread(_: str) -> Tensor:
        raise AssertionError("the weights were read")

    pair = factors(warm=3, fresh=0)
    before = pair.a.detach().clone()
    point_fresh({"w": pair}, start, unread, {}, seed=0)
    assert torch.equal(pair.a, before)


def test_the_randomised_factorisation_finds_the_leading_part_of_a_large_matrix() -> None:
    matrix = random(200, 8) @ random(8, 300, seed=1) + 0.01 * random(200, 300, seed=2)
    sizes, rows = leading_rows(matrix, 6, generator())
    _, expected_sizes, expected = torch.linalg.svd(matrix)
    torch.testing.assert_close(sizes, expected_sizes[:6], rtol=1e-4, atol=0.0)
    assert (rows @ expected[:6].t()).abs().diagonal().min() > 0.999
