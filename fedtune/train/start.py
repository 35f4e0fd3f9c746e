"""Where a device's fresh directions point: at random, or where its inputs or weights say.

A fresh direction is a row of A whose column of B is zero. It adds nothing to the product, so a
device may point it anywhere and still start with exactly what it was sent; the coordinator joins
the difference to that as ever. Directions that the device was sent as part of the joined adapter,
trained or frozen, stay as they are, and fresh ones leave out what those already span.

PiSSA and CorDA go further: they also start B at the weights' own leading part and take that part
out of the frozen matrix, so that training moves it. Here that would add B A to what the device was
sent and subtract it from a matrix that the coordinator does not know to have changed: the update
that it gives back would hold its own start. Only their directions are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.lora.linear import Factors
from fedtune.records import StartName

_OVERSAMPLED: Final = 8
_PASSES: Final = 4
"""Of the randomised factorisation (Halko et al., arXiv 0909.4061, algorithm 4.4); its usual
numbers."""
_DAMPING: Final = 1e-2
"""Share of the mean variance that is added to CorDA's covariance, which is inverted: a batch has
fewer tokens than a wide layer has inputs. Chosen."""


@torch.no_grad()
def point_fresh(
    factors: Mapping[str, Factors],
    start: StartName,
    weight: Callable[[str], Tensor],
    inputs: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Turn the fresh rows of every trained A, in place; the product B A stays what it is.

    A matrix with fewer such directions than fresh rows keeps the rows that are left over. Rows
    have norm 1, so that they learn at the speed of those that were sent.

    Args:
        weight: name -> the dense matrix (out, in) as this device holds it.
        inputs: name -> inputs (tokens, in); not read for `pissa`.
        seed: of the randomised factorisations.
    """
    for name, pair in factors.items():
        fresh = fresh_directions(pair)
        if not pair.trains or not len(fresh):
            continue
        known = torch.cat([pair.a[pair.b.any(dim=0)], pair.tail_a])
        generator = torch.Generator().manual_seed(seed)
        if start == "eva":
            found = eva(inputs[name], len(fresh), known)
        elif start == "pissa":
            found = pissa(weight(name), len(fresh), known, generator)
        else:
            found = corda(weight(name), inputs[name], len(fresh), known, generator)
        pair.a[fresh[: len(found)]] = found


def fresh_directions(pair: Factors) -> Tensor:
    """Indices of the rows of A whose columns of B are zero."""
    return (~pair.b.detach().any(dim=0)).nonzero().flatten()


def eva(
    x: Float[Tensor, "tokens in"], rank: int, known: Float[Tensor, "known in"]
) -> Float[Tensor, "found in"]:
    """The leading directions of the inputs, without those that are known.

    Source:
        EVA, arXiv 2410.07170, section 3.2. There ranks are dealt out by explained variance, which
        here is the plan's business, and batches are taken until the directions stand still.
    """
    rest = _without(x, known)
    _, sizes, rows = torch.linalg.svd(rest, full_matrices=False)
    found: Tensor = rows[: _count(sizes, rank, x)]
    return found


def pissa(
    weight: Float[Tensor, "out in"],
    rank: int,
    known: Float[Tensor, "known in"],
    generator: torch.Generator,
) -> Float[Tensor, "found in"]:
    """The leading right singular vectors of the weights, without those that are known.

    Source:
        PiSSA, arXiv 2404.02948, equation 2: A alone, see the head of this file.
    """
    sizes, rows = leading_rows(_without(weight, known), rank, generator)
    return rows[: _count(sizes, rank, weight)]


def corda(
    weight: Float[Tensor, "out in"],
    x: Float[Tensor, "tokens in"],
    rank: int,
    known: Float[Tensor, "known in"],
    generator: torch.Generator,
) -> Float[Tensor, "found in"]:
    """V^T C^-1 of the leading part U S V^T of W C, C the covariance of the inputs.

    Needs one matrix (in, in) in float32 at a time.

    Source:
        CorDA, arXiv 2406.05223, section 3.2, instruction-previewed adaption: A alone, see the head
        of this file; its rows are brought to norm 1.
    """
    covariance = x.t() @ x / x.shape[0]  # (in, in)
    mean = covariance.diagonal().mean()
    covariance.diagonal().add_(_DAMPING * mean)
    sizes, rows = leading_rows(weight @ covariance, rank, generator)
    rows = rows[: _count(sizes, rank, weight)]
    turned = _without(torch.linalg.solve(covariance, rows.t()).t(), known)
    return torch.nn.functional.normalize(turned, dim=1)


def leading_rows(
    matrix: Float[Tensor, "out in"], rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The leading singular values and right singular vectors (rank, in), by a randomised method.

    Exact where the rank, oversampled, reaches a side of the matrix.
    """
    size = min(rank + _OVERSAMPLED, *matrix.shape)
    probe = torch.randn(matrix.shape[0], size, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix.t() @ probe).Q  # (in, size)
    for _ in range(_PASSES):
        across = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.t() @ across).Q
    _, sizes, rows = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return sizes[:rank], (rows @ basis.t())[:rank]


def _without(rows: Tensor, known: Tensor) -> Tensor:
    """Rows less what lies in the span of the known rows."""
    if not known.shape[0]:
        return rows
    basis: Tensor = torch.linalg.qr(known.t().to(rows)).Q  # (in, known)
    return rows - (rows @ basis) @ basis.t()


def _count(sizes: Tensor, rank: int, whole: Tensor) -> int:
    """How many of the leading directions are more than rounding."""
    least = 1e-5 * torch.linalg.matrix_norm(whole)
    return min(rank, int((sizes > least).sum()))
