"""The rule `zero-pad`: factors padded with zeros and averaged apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.aggregate.contributions import (
    Share,
    holders,
    join_matrices,
    refuse_factors,
)
from fedtune.aggregate.directions import TailUse, fresh_rows, matrix_of
from fedtune.errors import PlanError
from fedtune.records import (
    Contribution,
    DevicePlan,
    Dispatch,
    FloatArray,
    GlobalAdapter,
    LoraFactors,
    LowRank,
    MatrixPlan,
    MatrixShape,
    Scale,
    scale_of,
)


@dataclass(frozen=True, slots=True)
class ZeroPad:
    """Average A and B apart, after padding each to the largest rank with zeros.

        B_new = sum_k p_k s_k pad(B_k)        A_new = sum_k p_k pad(A_k)

    The product of means is not the mean of products; the rule is the common baseline, here to
    compare with. The weights are normalised over the devices that trained the matrix. Directions
    that no device trained in a round stay as they are: averaged zeros would never train again.
    The state's `LowRank` holds u = scale * B, v = A.T and sigma 1. A plan's tail is not sent.

    Args:
        rank_cap: rank of the state, and the highest that a device may train.
        seed: of the A that all devices start from.
        workers: matrices that are joined at the same time; None: the usable cores.

    Source: Cho et al., "Heterogeneous LoRA for federated fine-tuning of on-device foundation
        models", 2024, https://arxiv.org/abs/2401.06432, section 3.2; without its pruning and
        sparsity weights.
    """

    rank_cap: int
    seed: int = 0
    workers: int | None = None
    name: ClassVar[str] = "zero-pad"
    tail: ClassVar[TailUse] = "none"

    def start(
        self, matrices: Sequence[MatrixShape], dense: Mapping[str, FloatArray]
    ) -> GlobalAdapter:
        return GlobalAdapter(
            round=0,
            matrices={m.name: self._start_matrix(m) for m in matrices},
            dense={name: np.array(value, np.float32) for name, value in dense.items()},
        )

    def dispatch(
        self, adapter: GlobalAdapter, plan: DevicePlan, *, scale: Scale, rng: np.random.Generator
    ) -> Dispatch:
        trained = {
            matrix.name: _leading_factors(
                matrix_of(adapter.matrices, matrix.name, plan.device),
                matrix,
                plan.device,
                scale_of(scale, matrix.rank),
            )
            for matrix in plan.matrices
            if matrix.rank > 0
        }
        return Dispatch(trained=trained, dense=dict(adapter.dense))

    def join(self, adapter: GlobalAdapter, contributions: Sequence[Contribution]) -> GlobalAdapter:
        return join_matrices(adapter, contributions, _join_matrix, self.workers)

    def _start_matrix(self, shape: MatrixShape) -> LowRank:
        rank = min(self.rank_cap, shape.out_features, shape.in_features)
        rows = fresh_rows(self.seed, shape.name, rank, shape.in_features)
        return LowRank(
            u=np.zeros((shape.out_features, rank), np.float32),
            sigma=np.ones(rank, np.float32),
            v=np.ascontiguousarray(rows.T),
        )


def _leading_factors(
    low_rank: LowRank, matrix: MatrixPlan, device: str, scale: float
) -> LoraFactors:
    if matrix.rank > low_rank.rank:
        raise PlanError(
            f"rank of {matrix.name} for {device} must be at most {low_rank.rank} under the rule "
            f"zero-pad, got {matrix.rank}; lower lora.rank_max or raise lora.rank_cap"
        )
    return LoraFactors(
        a=np.ascontiguousarray(low_rank.v[:, : matrix.rank].T),
        b=low_rank.u[:, : matrix.rank] / np.float32(scale),
        scale=scale,
    )


def _join_matrix(name: str, before: LowRank, shares: Sequence[Share]) -> tuple[LowRank, float]:
    refuse_factors(shares, ZeroPad.name)
    held = [share for share in shares if name in share.factors]
    if not held:
        return before, 0.0
    total = math.fsum(share.weight for share in held)
    largest = max(share.sent.trained[name].rank for share in held)
    u, v = before.u.astype(np.float64), before.v.astype(np.float64)
    u[:, :largest] = 0.0
    v[:, :largest] = 0.0
    for share, _, factors in holders(name, held):
        weight = share.weight / total
        u[:, : factors.rank] += weight * factors.scale * factors.b.astype(np.float64)
        v[:, : factors.rank] += weight * factors.a.astype(np.float64).T
    joined = LowRank(u=u.astype(np.float32), sigma=before.sigma, v=v.astype(np.float32))
    return joined, 0.0
