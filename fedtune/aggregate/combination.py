"""Linear combinations of a few low-rank matrices, and the parts of one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.aggregate.low_rank import empty, pair_of_low_rank, recompress
from fedtune.records import LowRank


def combine(
    terms: Mapping[str, LowRank], coefficients: Mapping[str, float], rank_cap: int
) -> tuple[LowRank, float]:
    """The sum of coefficient times term, cut to a rank.

    A term that comes twice (a matrix that nobody trained is the same before and after a round) has
    its columns once, so that it cancels exactly.

    Args:
        terms: name -> matrix, all of one shape (out, in); at least one.
        coefficients: by the names of the terms; one that is absent counts as 0, and a name
            without a term adds nothing.

    Returns:
        The sum, and the share of its squared norm that the cap cut off.
    """
    weights: dict[int, float] = {}
    for name, coefficient in coefficients.items():
        if name in terms:
            key = id(terms[name])
            weights[key] = weights.get(key, 0.0) + coefficient
    unique = {id(term): term for term in terms.values()}
    pairs = [pair_of_low_rank(unique[key], weight) for key, weight in weights.items() if weight]
    if not pairs:
        first = next(iter(terms.values()))
        return empty(first.u.shape[0], first.v.shape[0]), 0.0
    return recompress(pairs, rank_cap)


def split(low_rank: LowRank, rank: int) -> tuple[LowRank, LowRank]:
    """The leading `rank` directions, and the others."""

    def part(chosen: slice) -> LowRank:
        u, v = (np.ascontiguousarray(side[:, chosen]) for side in (low_rank.u, low_rank.v))
        return LowRank(u=u, sigma=low_rank.sigma[chosen], v=v)

    return part(slice(rank)), part(slice(rank, None))
