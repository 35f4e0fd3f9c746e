"""The rule `flexlora`: the mean of whole products, cut to the cap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from fedtune.aggregate.contributions import Share, join_matrices, refuse_factors, returned
from fedtune.aggregate.delta import empty_adapter
from fedtune.aggregate.directions import TailUse, choose_directions, dispatch_directions
from fedtune.aggregate.folding import Columns, add_up, columns_of_factors, columns_of_low_rank
from fedtune.aggregate.low_rank import reduce_sum
from fedtune.records import (
    Contribution,
    DevicePlan,
    Dispatch,
    FloatArray,
    GlobalAdapter,
    LowRank,
    MatrixShape,
    Scale,
)


@dataclass(frozen=True, slots=True)
class FlexLora:
    """Average what each device holds of a matrix, then keep the top directions:

        G_new = sum_k p_k (s_k B_k A_k + T_k)

    The weights are normalised over the devices that trained the matrix; T_k is the frozen tail
    that the device was given, zero in the paper. A device of low rank votes zero on every
    direction that it was not sent, so the joined rank shrinks towards that of the weak devices;
    the rule is here to compare with.

    Args:
        rank_cap: directions kept per matrix.
        fresh_rank: how many of a device's directions are fresh in every round.
        workers: matrices that are joined at the same time; None: the usable cores.

    Source: Bai et al., "Federated fine-tuning of large language models under heterogeneous tasks
        and client resources", 2024, https://arxiv.org/abs/2402.11505, section 3. A device whose
        rank is above that of the state gets fresh directions instead of none.
    """

    rank_cap: int
    fresh_rank: int = 0
    workers: int | None = None
    name: ClassVar[str] = "flexlora"
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
        return join_matrices(adapter, contributions, self._join_matrix, self.workers)

    def _join_matrix(
        self, name: str, before: LowRank, shares: Sequence[Share]
    ) -> tuple[LowRank, float]:
        refuse_factors(shares, self.name)
        held = [share for share in shares if name in share.factors]
        if not held:
            return before, 0.0
        total = math.fsum(share.weight for share in held)
        sent = [share.sent for share in held]
        columns = sum(s.trained[name].rank for s in sent)
        columns += sum(s.tail[name].rank for s in sent if name in s.tail)

        def parts() -> Iterator[Columns]:
            for share in held:
                yield columns_of_factors(returned(name, share), share.weight / total)
                if name in share.sent.tail:
                    yield columns_of_factors(share.sent.tail[name], share.weight / total)

        nothing = columns_of_low_rank(before, np.zeros(before.rank))
        return reduce_sum(add_up(nothing, parts(), columns), self.rank_cap)
