"""The frozen pair that repairs a quantised matrix on its device: W ~ Q(W - L) + L, L of low rank.

A device computes with what its format left of W. Without a repair, the adapter that it trains and
shares also learns to make up for that loss, which differs from device to device. So the repair is a
pair of its own: made when the base is read, frozen, and never sent.

L is the best low-rank approximation of what the quantised matrix lacks, and the quantised matrix is
made of what L lacks, in turns. Two starts are tried, because each can be much the better one: L = 0
(a matrix that its codebook holds exactly stays exact) and L = the leading directions of W itself
(real weights: less error after one turn than the other start reaches in eight).

Source: LQ-LoRA (https://arxiv.org/abs/2311.12023), section 3, algorithm 1, and section 3.2 for the
weights. Its code keeps the last turn, even when that is worse; here the best one is kept. LoftQ
(https://arxiv.org/abs/2310.08659) starts from L = 0. Both put L into the trained adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.quant.storage import StoredMatrix, store
from fedtune.records import MatrixForm

TURNS = 3
"""Times that matrix and pair are fitted to each other, from W's own directions. Chosen: on the
weights of MiniLM each further turn lowers the error by 1 % or less."""
PAIR_DTYPE = torch.float16
"""Of a frozen pair: its rounding is a thousand times smaller than what it repairs."""

_EXACT_SIDE = 512
"""Up to this shorter side the singular values are computed exactly (30 ms on one core)."""
_OVERSAMPLING = 16
_POWER_STEPS = 4
"""Of the randomised decomposition (Halko et al., https://arxiv.org/abs/0909.4061, section 4.5). The
spectrum of a quantisation error falls slowly, so that it needs more of both than usual."""
_LEAST_ROOT = 1e-3
"""Of a row's or column's weight, beside that of the largest; keeps the pair within float16."""


@dataclass(frozen=True, slots=True)
class Pair:
    """L = b @ a, in `PAIR_DTYPE`."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def bytes(self) -> int:
        return (self.a.numel() + self.b.numel()) * self.a.element_size()

    def product(self) -> Float[Tensor, "out in"]:
        """The dense L, in float32."""
        return self.b.float() @ self.a.float()


def store_corrected(
    weight: Float[Tensor, "out in"],
    form: MatrixForm,
    row_weights: Float[Tensor, " out"] | None = None,
    column_weights: Float[Tensor, " in"] | None = None,
    turns: int = TURNS,
) -> tuple[StoredMatrix, Pair | None]:
    """Hold a matrix in its form, and the pair that repairs it; no pair at correction rank 0.

    The same weight and form give the same result on one machine. A rank above the shorter side of
    the matrix is that side.

    Args:
        row_weights: how much an error counts by its row; None: all rows alike. LQ-LoRA takes the
            means of the Fisher information over the columns.
        column_weights: the same by column; the mean squares of the inputs are another choice.
        turns: how often matrix and pair are fitted to each other.
    """
    plain = replace(form, correction_rank=0)
    if form.correction_rank == 0:
        return store(weight, plain), None
    weight = weight.detach().float()
    scales = _Scales.of(weight, row_weights, column_weights)
    best: tuple[float, StoredMatrix, Pair] | None = None
    for stored, pair in _fits(weight, plain, form.correction_rank, scales, turns):
        error = squared_error(weight, stored, pair, row_weights, column_weights)
        if best is None or error < best[0]:
            best = error, stored, pair
    assert best is not None
    return best[1], best[2]


def correction_of(
    weight: Float[Tensor, "out in"],
    stored: StoredMatrix,
    rank: int,
    row_weights: Float[Tensor, " out"] | None = None,
    column_weights: Float[Tensor, " in"] | None = None,
) -> Pair:
    """The pair that repairs a matrix as it is stored; `store_corrected` finds a better fit."""
    weight = weight.detach().float()
    scales = _Scales.of(weight, row_weights, column_weights)
    return _leading(weight - stored.values(torch.float32), rank, scales)


def squared_error(
    weight: Float[Tensor, "out in"],
    stored: StoredMatrix,
    pair: Pair | None = None,
    row_weights: Float[Tensor, " out"] | None = None,
    column_weights: Float[Tensor, " in"] | None = None,
) -> float:
    """sum_ij r_i c_j (W - Q - b a)_ij^2, with every weight 1 where none are given."""
    left = weight.detach().float() - stored.values(torch.float32)
    if pair is not None:
        left -= pair.product()
    squares = left.square_()
    if row_weights is not None:
        squares *= row_weights.to(left.device, torch.float32)[:, None]
    if column_weights is not None:
        squares *= column_weights.to(left.device, torch.float32)[None, :]
    return float(squares.sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class _Scales:
    """Roots of the weights: an error scaled by both has the weighted error as its square."""

    rows: Float[Tensor, "out 1"]
    columns: Float[Tensor, "1 in"]

    @classmethod
    def of(
        cls,
        weight: Float[Tensor, "out in"],
        row_weights: Float[Tensor, " out"] | None,
        column_weights: Float[Tensor, " in"] | None,
    ) -> _Scales:
        out_features, in_features = weight.shape
        return cls(
            _root(row_weights, out_features, weight)[:, None],
            _root(column_weights, in_features, weight)[None, :],
        )


def _root(weights: Tensor | None, length: int, like: Tensor) -> Tensor:
    """Roots relative to the largest; the pair is divided by them, so that none may be near 0."""
    largest = 0.0 if weights is None else float(weights.max())
    if weights is None or largest <= 0:
        return torch.ones(length, dtype=torch.float32, device=like.device)
    roots: Tensor = (weights.to(like.device, torch.float32) / largest).sqrt()
    return roots.clamp_min(_LEAST_ROOT)


def _fits(
    weight: Float[Tensor, "out in"], form: MatrixForm, rank: int, scales: _Scales, turns: int
) -> Iterator[tuple[StoredMatrix, Pair]]:
    """Matrices with their pairs: from L = 0 once, and turn by turn from W's own directions."""
    low = torch.zeros_like(weight)
    for turn in range(turns + 1):
        stored = store(weight - low, form)
        pair = _leading(weight - stored.values(torch.float32), rank, scales)
        yield stored, pair
        low = (_leading(weight, rank, scales) if turn == 0 else pair).product()


def _leading(error: Float[Tensor, "out in"], rank: int, scales: _Scales) -> Pair:
    """The pair of that rank nearest to a matrix in the weighted norm."""
    scaled = scales.rows * error * scales.columns
    u, sigma, v = leading_directions(scaled, rank)
    b = (u * sigma) / scales.rows
    a = v.t() / scales.columns
    # Split evenly, so that both factors keep their precision.
    root = (_norms(b, 0) / _norms(a, 1)).sqrt()
    return Pair((a * root[:, None]).to(PAIR_DTYPE), (b / root).to(PAIR_DTYPE))


def _norms(factor: Tensor, axis: int) -> Float[Tensor, " rank"]:
    norms: Tensor = torch.linalg.vector_norm(factor, dim=axis)
    return norms.clamp_min(1e-12)


def leading_directions(
    matrix: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "in rank"]]:
    """The largest singular values and their vectors; exact for small matrices, else randomised.

    The random start is seeded, so that the same matrix gives the same answer.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(_EXACT_SIDE, 2 * (rank + _OVERSAMPLING)):
        u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], sigma[:rank], v[:rank].t()
    generator = torch.Generator(device=matrix.device).manual_seed(0)
    start = torch.randn(
        matrix.shape[1], rank + _OVERSAMPLING, generator=generator, device=matrix.device
    )
    basis = torch.linalg.qr(matrix @ start).Q  # (out, rank + oversampling)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, sigma, v = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], sigma[:rank], v[:rank].t()
