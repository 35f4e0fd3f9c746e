"""The rule `flora`: fresh pairs every round, stacked onto a frozen global update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.aggregate.contributions import Share, join_matrices
from fedtune.aggregate.delta import empty_adapter, join_differences
from fedtune.aggregate.directions import TailUse, all_fresh, dispatch_directions
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
class Flora:
    """Every device trains a fresh pair (B zero, A random) on top of the whole global update.

        G_new = G + sum_k p_k s_k B_k A_k

    The weights are normalised over all devices that reported. The whole of G goes to every device
    as its frozen tail, whatever the plan's tail rank says, and is compressed without loss: its
    rank grows up to min(out, in), and so does the download. It has no cap.

    Args:
        workers: matrices that are joined at the same time; None: the usable cores.

    Source: Wang et al., "FLoRA: federated fine-tuning large language models with heterogeneous
        low-rank adaptations", 2024, https://arxiv.org/abs/2409.05976, section 3. The paper merges
        the stack into the base model; we keep it apart, so that a quantised base stays untouched.
    """

    workers: int | None = None
    name: ClassVar[str] = "flora"
    tail: ClassVar[TailUse] = "whole"

    def start(
        self, matrices: Sequence[MatrixShape], dense: Mapping[str, FloatArray]
    ) -> GlobalAdapter:
        return empty_adapter(matrices, dense)

    def dispatch(
        self, adapter: GlobalAdapter, plan: DevicePlan, *, scale: Scale, rng: np.random.Generator
    ) -> Dispatch:
        return dispatch_directions(adapter, plan, all_fresh, scale=scale, rng=rng)

    def join(self, adapter: GlobalAdapter, contributions: Sequence[Contribution]) -> GlobalAdapter:
        return join_matrices(adapter, contributions, _join_matrix, self.workers)


def _join_matrix(name: str, before: LowRank, shares: Sequence[Share]) -> tuple[LowRank, float]:
    """The fresh pairs started at zero, so the rule of differences adds them whole."""
    return join_differences(name, before, shares, min(before.u.shape[0], before.v.shape[0]))
