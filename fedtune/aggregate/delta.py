"""The rule `delta`: the exact mean of differences, joined in factored form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.contributions import Share, join_matrices, returned
from fedtune.aggregate.directions import (
    TailUse,
    choose_directions,
    dispatch_directions,
    split_triplets,
)
from fedtune.aggregate.folding import (
    Columns,
    add_up,
    columns_of_factors,
    columns_of_low_rank,
)
from fedtune.aggregate.low_rank import empty, reduce_sum
from fedtune.records import (
    Contribution,
    DevicePlan,
    Dispatch,
    FloatArray,
    GlobalAdapter,
    LoraFactors,
    LowRank,
    MatrixShape,
    Scale,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """Add each device's change to the global update:

        G_new = G + sum_k p_k (s_k B_k A_k - P_k)

    P_k = s_k B_k0 A_k0 is what device k was sent, and p_k are weights normalised over all devices
    that reported. A device says nothing on directions that it was not sent, and nothing on a
    matrix that it does not train: there its difference is zero, and the others' weights stay.
    A frozen tail adds the same to both terms and cancels.

    Args:
        rank_cap: directions kept per matrix. Without a cap, directions that no device can revise
            would accumulate.
        fresh_rank: how many of a device's directions are fresh in every round.
        workers: matrices that are joined at the same time; None: the usable cores.
    """

    rank_cap: int
    fresh_rank: int = 0
    workers: int | None = None
    name: ClassVar[str] = "delta"
    tail: ClassVar[TailUse] = "planned"

    def start(
        self, matrices: Sequence[MatrixShape], dense: Mapping[str, FloatArray]
    ) -> GlobalAdapter:
        return empty_adapter(matrices, dense)

    def dispatch(
        self, adapter: GlobalAdapter, plan: DevicePlan, *, scale: Scale, rng: np.random.Generator
    ) -> Dispatch:
        policy = partial(choose_directions, fresh_rank=self.fresh_rank)
        return dispatch_directions(adapter, plan, policy, scale=scale, rng=rng)

    def join(self, adapter: GlobalAdapter, contributions: Sequence[Contribution]) -> GlobalAdapter:
        def join_matrix(
            name: str, before: LowRank, shares: Sequence[Share]
        ) -> tuple[LowRank, float]:
            return join_differences(name, before, shares, self.rank_cap)

        return join_matrices(adapter, contributions, join_matrix, self.workers)


def empty_adapter(
    matrices: Sequence[MatrixShape], dense: Mapping[str, FloatArray]
) -> GlobalAdapter:
    """The state before the first round: no direction in any matrix."""
    return GlobalAdapter(
        round=0,
        matrices={m.name: empty(m.out_features, m.in_features) for m in matrices},
        dense={name: np.array(value, np.float32) for name, value in dense.items()},
    )


def join_differences(
    name: str, before: LowRank, shares: Sequence[Share], rank_cap: int
) -> tuple[LowRank, float]:
    """G + sum_k p_k (s_k B_k A_k - P_k) of one matrix, and the share of energy dropped.

    Where P_k is bit for bit a truncation of G, it is folded into G's own columns: direction j
    then weighs `sigma_j * (1 - sum of p_k over the devices that were sent it)`, and the stack has
    no columns for P_k. Elsewhere (what was sent went through float16, or the device took part
    under another state) P_k is stacked with a minus sign.
    """
    held = [share for share in shares if name in share.factors]
    if not held:
        return before, 0.0
    warm = _truncation_ranks(name, before, held)
    kept = np.ones(before.rank)
    columns = 0
    for share, rank in zip(held, warm, strict=True):
        columns += share.sent.trained[name].rank * (2 if rank is None else 1)
        if rank is not None:
            kept[:rank] -= share.step

    def parts() -> Iterator[Columns]:
        for share, rank in zip(held, warm, strict=True):
            yield columns_of_factors(returned(name, share), share.step)
            if rank is None:
                yield columns_of_factors(share.sent.trained[name], -share.step)

    state = columns_of_low_rank(before, remaining(kept))
    return reduce_sum(add_up(state, parts(), columns), rank_cap)


def _truncation_ranks(name: str, before: LowRank, held: Sequence[Share]) -> list[int | None]:
    """`truncation_rank` of each device; devices that share a dispatch are looked at once."""
    known: dict[int, int | None] = {}
    for share in held:
        if id(share.sent) not in known:
            known[id(share.sent)] = truncation_rank(before, share.sent.trained[name])
    return [known[id(share.sent)] for share in held]


def truncation_rank(before: LowRank, sent: LoraFactors) -> int | None:
    """How many leading triplets of the state were sent, if nothing else was; None otherwise.

    Columns of b that are zero (fresh directions) send nothing.
    """
    warm = int(np.count_nonzero(sent.b.any(axis=0)))
    if warm > before.rank:
        return None
    expected = split_triplets(before, 0, warm, sent.scale)
    same_b = np.array_equal(sent.b[:, :warm], expected.b)
    same_a = np.array_equal(sent.a[:warm], expected.a)
    return warm if same_a and same_b else None


def remaining(kept: Float[np.ndarray, "rank"]) -> Float[np.ndarray, "rank"]:
    """Shares of G's columns; what is left by rounding of weights that add up to 1 is zero."""
    return np.where(np.abs(kept) < 1e-12, 0.0, kept)
