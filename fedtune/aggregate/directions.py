"""What a device is sent: which directions of the global adapter it trains, which stay frozen.

`choose_directions` is the whole policy; everything else here only carries it out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from fedtune.errors import PlanError
from fedtune.records import (
    DevicePlan,
    Dispatch,
    FloatArray,
    GlobalAdapter,
    LoraFactors,
    LowRank,
    MatrixPlan,
    Scale,
    scale_of,
)


@dataclass(frozen=True, slots=True)
class Directions:
    """How one device's directions of one matrix split up.

    Attributes:
        warm: leading triplets of the global adapter that the device goes on training.
        fresh: further trained directions that start at zero (a random row of A, B zero).
        tail: triplets after the warm ones that the device gets frozen.
    """

    warm: int
    fresh: int
    tail: int


TailUse: TypeAlias = Literal["planned", "none", "whole"]
"""What of the global adapter a rule gives its devices frozen."""

Policy = Callable[[int, MatrixPlan], Directions]
"""(directions in the global adapter, the device's plan of the matrix) -> its directions."""


def choose_directions(available: int, plan: MatrixPlan, fresh_rank: int = 0) -> Directions:
    """Train the top of the global adapter, fill up with fresh directions, freeze the next ones.

    Args:
        available: rank of the global adapter for this matrix.
        plan: gives the trained rank and the tail rank.
        fresh_rank: how many of the trained directions are fresh in every round.
    """
    warm = min(available, max(plan.rank - fresh_rank, 0))
    tail = min(available - warm, plan.tail_rank)
    return Directions(warm=warm, fresh=plan.rank - warm, tail=tail)


def all_fresh(available: int, plan: MatrixPlan) -> Directions:
    """Train fresh directions only and freeze the whole global adapter."""
    return Directions(warm=0, fresh=plan.rank, tail=available)


def dispatch_directions(
    adapter: GlobalAdapter,
    plan: DevicePlan,
    policy: Policy,
    *,
    scale: Scale,
    rng: np.random.Generator,
) -> Dispatch:
    """Cut out of the global adapter what the plan gives to its device, in float32.

    One number is drawn from `rng`; the fresh rows of each matrix come from a generator seeded by
    it and by the matrix name. So devices whose generators start equal share their leading fresh
    rows, whatever the ranks of this and of the other matrices are.

    Raises:
        PlanError: the plan names a matrix that the adapter does not hold.
    """
    round_seed = int(rng.integers(2**63))
    trained: dict[str, LoraFactors] = {}
    tail: dict[str, LoraFactors] = {}
    for matrix in plan.matrices:
        low_rank = matrix_of(adapter.matrices, matrix.name, plan.device)
        split = policy(low_rank.rank, matrix)
        factor = scale_of(scale, matrix.rank)
        if matrix.rank > 0:
            warm = split_triplets(low_rank, 0, split.warm, factor)
            rows = fresh_rows(round_seed, matrix.name, split.fresh, low_rank.v.shape[0])
            trained[matrix.name] = append_fresh(warm, rows)
        if split.tail > 0:
            end = split.warm + split.tail
            tail[matrix.name] = split_triplets(low_rank, split.warm, end, factor)
    return Dispatch(trained=trained, tail=tail, dense=dict(adapter.dense))


def matrix_of(matrices: Mapping[str, LowRank], name: str, device: str) -> LowRank:
    """The state of one matrix of a plan.

    Raises:
        PlanError: there is none.
    """
    if name not in matrices:
        raise PlanError(
            f"the plan of {device} names matrix {name}, which the global adapter does not hold; "
            "plan the fleet again for this model"
        )
    return matrices[name]


def split_triplets(low_rank: LowRank, start: int, stop: int, scale: float) -> LoraFactors:
    """Triplets start..stop as factors: `scale * b @ a` is their product, rows of a have norm 1.

    Fresh rows of A have norm 1 as well, so a warm and a fresh direction learn at one speed. With
    the root of sigma on each side, a step of B would be scaled by the root of sigma in the
    product: slow where sigma is small, fast where it is large. At small learning rates that loses
    a few per cent of loss, at the rate that suits the model the two agree within seed noise.
    """
    sigma = low_rank.sigma[start:stop].astype(np.float64)
    b = low_rank.u[:, start:stop] * (sigma / scale)  # (out, rank)
    a = low_rank.v[:, start:stop].T  # (rank, in)
    return LoraFactors(a=a.astype(np.float32), b=b.astype(np.float32), scale=scale)


def fresh_rows(
    round_seed: int, name: str, rank: int, in_features: int
) -> Float[np.ndarray, "rank in"]:
    """Gaussian rows of A with standard deviation 1/sqrt(in): a unit input keeps its scale."""
    rng = np.random.default_rng([round_seed, zlib.crc32(name.encode("utf-8"))])
    rows = rng.standard_normal((rank, in_features)) / np.sqrt(in_features)
    return np.asarray(rows, dtype=np.float32)


def append_fresh(warm: LoraFactors, rows: FloatArray) -> LoraFactors:
    """The warm factors followed by fresh rows of A, whose columns of B are zero."""
    zeros = np.zeros((warm.b.shape[0], rows.shape[0]), np.float32)
    return LoraFactors(
        a=np.concatenate([warm.a, rows], axis=0),
        b=np.concatenate([warm.b, zeros], axis=1),
        scale=warm.scale,
    )
