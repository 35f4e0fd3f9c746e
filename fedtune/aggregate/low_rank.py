"""Low-rank algebra: a sum of factor pairs becomes one truncated singular value decomposition.

A sum of low-rank products is `left @ right.T`, where `left` (out, q) and `right` (in, q) hold the
pairs' columns side by side. `reduce_sum` finds its leading singular triplets by the route that
costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedtune.aggregate.krylov import by_krylov
from fedtune.aggregate.route_costs import EXACT, Problem, Route, by_cost
from fedtune.aggregate.singular import Triplets, by_gram, factored, multiplied
from fedtune.aggregate.stack import Stack, Sum, stack_of
from fedtune.records import FloatArray, LoraFactors, LowRank


@dataclass(frozen=True, slots=True)
class Pair:
    """Columns whose products add up: `left @ right.T`, left (out, q), right (in, q), float64."""

    left: FloatArray
    right: FloatArray


def empty(out_features: int, in_features: int) -> LowRank:
    """The zero update of rank 0."""
    return LowRank(
        u=np.zeros((out_features, 0), np.float32),
        sigma=np.zeros(0, np.float32),
        v=np.zeros((in_features, 0), np.float32),
    )


def pair_of_factors(factors: LoraFactors, weight: float = 1.0) -> Pair:
    """`weight * scale * b @ a` as columns."""
    left = factors.b.astype(np.float64) * (weight * factors.scale)
    return Pair(left=left, right=factors.a.astype(np.float64).T)


def pair_of_low_rank(low_rank: LowRank, share: float | Float[np.ndarray, "rank"] = 1.0) -> Pair:
    """`u @ diag(share * sigma) @ v.T` as columns; `share` may differ by direction."""
    left = low_rank.u.astype(np.float64) * (low_rank.sigma.astype(np.float64) * share)
    return Pair(left=left, right=low_rank.v.astype(np.float64))


def recompress(
    pairs: Sequence[Pair], rank_cap: int, route: Route | None = None
) -> tuple[LowRank, float]:
    """Add pairs up and keep the `rank_cap` directions of most energy, as `reduce_sum` does.

    Args:
        pairs: at least one; together they give the shape.
        rank_cap: most directions to keep.
        route: how to compute; None chooses the cheapest.
    """
    left = np.concatenate([pair.left for pair in pairs], axis=1)  # (out, q)
    right = np.concatenate([pair.right for pair in pairs], axis=1)  # (in, q)
    return reduce_sum(stack_of(left, right), rank_cap, route)


def reduce_sum(total: Sum, rank_cap: int, route: Route | None = None) -> tuple[LowRank, float]:
    """Keep the `rank_cap` directions of most energy of a sum.

    A route that finds that it was not exact gives way to the next cheapest.
    The sign of each triplet is fixed by the largest entry of u.

    Args:
        rank_cap: most directions to keep.
        route: how to compute; None chooses the cheapest.

    Returns:
        The update in float32 and the share of the squared norm that the cap cut off, 0..1.
    """
    total = total.alive()
    if total.columns == 0:
        return empty(*total.shape), 0.0
    order = by_cost(problem_of(total, rank_cap)) if route is None else (route, *EXACT)
    answers = (ROUTES[each](total, rank_cap) for each in order)
    triplets = next(answer for answer in answers if answer is not None)
    return _stored(triplets), triplets.dropped


def problem_of(total: Sum, rank_cap: int) -> Problem:
    """What the cost model knows of a sum."""
    columns = total.columns if isinstance(total, Stack) else None
    return Problem(*total.shape, columns, rank_cap, total.dtype == np.float32)


def _factored(total: Sum, rank_cap: int) -> Triplets:
    if isinstance(total, Stack):
        return factored(total, rank_cap, np.float32)  # as it is stored
    return multiplied(total, rank_cap)


ROUTES: Mapping[Route, Callable[[Sum, int], Triplets | None]] = {
    "factored": _factored,
    "multiplied": multiplied,
    "gram": by_gram,
    "krylov": by_krylov,
}


def _stored(triplets: Triplets) -> LowRank:
    """In float32, each triplet with the sign that makes the largest entry of u positive."""
    u = np.ascontiguousarray(triplets.u, dtype=np.float32)
    v = np.ascontiguousarray(triplets.v, dtype=np.float32)
    sign = signs(u)
    u *= sign
    v *= sign
    return LowRank(u=u, sigma=triplets.sigma.astype(np.float32), v=v)


def signs(u: Float[np.ndarray, "out rank"]) -> Float[np.ndarray, "rank"]:
    """1 or -1 a column: the sign of its entry of largest size, the first of equal ones."""
    column = np.arange(u.shape[1])
    top, bottom = u.argmax(axis=0), u.argmin(axis=0)
    high, low = u[top, column], -u[bottom, column]
    negative = (low > high) | ((low == high) & (bottom < top))
    return np.where(negative, -1, 1).astype(u.dtype)
