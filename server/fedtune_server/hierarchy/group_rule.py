"""What a group is sent, cut for its devices; and what they return, joined into one update.

The group is sent P = s B0 A0 as a device is, and takes it for a global adapter of its own. Its
devices get their leading directions of it, so what they are sent is what they would have been sent
without the group. With weights q_k that add up to 1 over those that answer, the group returns

    s B A = P + sum_k q_k (s_k B_k A_k - P_k)

which is the rule `delta` on P. The level above adds p (s B A - P), with p the sum of its devices'
weights, and p q_k is what device k would have counted without the group: the two levels add up to
the flat rule, as long as the group's plan has a rank that holds the sum (`rank_needed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedtune.aggregate.contributions import Share, join_matrices
from fedtune.aggregate.delta import empty_adapter, join_differences
from fedtune.aggregate.directions import (
    TailUse,
    choose_directions,
    dispatch_directions,
    split_triplets,
)
from fedtune.aggregate.low_rank import empty
from fedtune.errors import ProtocolError
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
class GroupRule:
    """The rule `delta` inside a group, over what the group was sent.

    Args:
        whole: all directions that the group was sent, frozen ones at the end.
        ranks: matrix -> directions that the group may return.
    """

    whole: GlobalAdapter
    ranks: Mapping[str, int]
    name: ClassVar[str] = "group"
    tail: ClassVar[TailUse] = "planned"

    def start(
        self, matrices: Sequence[MatrixShape], dense: Mapping[str, FloatArray]
    ) -> GlobalAdapter:
        return empty_adapter(matrices, dense)

    def dispatch(
        self, adapter: GlobalAdapter, plan: DevicePlan, *, scale: Scale, rng: np.random.Generator
    ) -> Dispatch:
        """Cut out of the whole, not of `adapter`: a device's tail may lie in the group's own."""
        return dispatch_directions(self.whole, plan, choose_directions, scale=scale, rng=rng)

    def join(self, adapter: GlobalAdapter, contributions: Sequence[Contribution]) -> GlobalAdapter:
        def join_matrix(
            name: str, before: LowRank, shares: Sequence[Share]
        ) -> tuple[LowRank, float]:
            return join_differences(name, before, shares, self.ranks[name])

        return join_matrices(adapter, contributions, join_matrix)


def trained_state(sent: Dispatch, round: int) -> GlobalAdapter:
    """What a group was sent to train, as the state before its round.

    Directions stay as they came: u is B, v is A transposed, every sigma the scale.
    """
    matrices = {name: _directions(pair) for name, pair in sent.trained.items()}
    return GlobalAdapter(round - 1, matrices, dict(sent.dense))


def whole_state(sent: Dispatch, shapes: Iterable[MatrixShape], round: int) -> GlobalAdapter:
    """All that a group was sent, the frozen directions behind the trained ones; every matrix."""
    matrices = {each.name: empty(each.out_features, each.in_features) for each in shapes}
    matrices |= trained_state(sent, round).matrices
    for name, pair in sent.tail.items():
        matrices[name] = _beside(matrices[name], _directions(pair))
    return GlobalAdapter(round - 1, matrices, dict(sent.dense))


def _directions(pair: LoraFactors) -> LowRank:
    """Those up to the last whose column of B is not zero: fresh ones send nothing."""
    used = np.flatnonzero(pair.b.any(axis=0))
    warm = int(used[-1]) + 1 if len(used) else 0
    return LowRank(pair.b[:, :warm], np.full(warm, pair.scale), pair.a[:warm].T)


def _beside(first: LowRank, second: LowRank) -> LowRank:
    return LowRank(
        np.concatenate([first.u, second.u], axis=1),
        np.concatenate([first.sigma, second.sigma]),
        np.concatenate([first.v, second.v], axis=1),
    )


def as_factors(joined: LowRank, sent: LoraFactors) -> LoraFactors:
    """A joined matrix as the factors that a group returns: of the rank that it was sent."""
    found = split_triplets(joined, 0, min(joined.rank, sent.rank), sent.scale)
    missing = sent.rank - found.rank
    return LoraFactors(
        a=np.pad(found.a, ((0, missing), (0, 0))),
        b=np.pad(found.b, ((0, 0), (0, missing))),
        scale=sent.scale,
    )


def within(plan: DevicePlan, group: DevicePlan) -> DevicePlan:
    """A device's plan, cut to what its group was sent and may do in a round.

    Raises:
        ProtocolError: the group was sent no matrix that the device trains.
    """
    ranks = group.ranks()
    known = {matrix.name: matrix.tail_rank for matrix in group.matrices}
    matrices = tuple(
        replace(
            matrix,
            rank=min(matrix.rank, ranks.get(matrix.name, 0)),
            tail_rank=matrix.tail_rank if matrix.name in ranks or known.get(matrix.name) else 0,
        )
        for matrix in plan.matrices
    )
    cut = replace(plan, matrices=matrices, local_steps=min(plan.local_steps, group.local_steps))
    if not cut.ranks():
        raise ProtocolError(
            f"{plan.device} trains no matrix that the group {group.device} was sent; raise the "
            "rank of the group's class"
        )
    return cut


def rank_needed(name: str, warm: int, plans: Iterable[DevicePlan]) -> int:
    """Directions of one matrix that a group has to return, so that nothing is cut off.

    Args:
        warm: directions that the group was sent to train and that are not fresh.
    """
    return warm + sum(plan.ranks().get(name, 0) for plan in plans)
