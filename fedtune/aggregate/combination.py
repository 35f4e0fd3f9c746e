"""Linear combinations of a few low-rank matrices, several of them in one basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from fedtune.aggregate.low_rank import Pair, empty, pair_of_low_rank, recompress
from fedtune.records import FloatArray, LowRank

_THIN: Final = 0.75
"""Columns over the shorter side up to which a basis is made first; near 1 it saves nothing."""


class SharedBasis:
    """What several sums of the same terms have in common: one orthonormal basis for each side.

    Householder QR of the stacked columns in float64 is most of the work of a sum. It is done once;
    each sum after that is the SVD of a small core. A term that comes twice (a matrix that nobody
    trained is the same before and after a round) has its columns once, so that it cancels exactly.

    Args:
        terms: name -> matrix, all of one shape (out, in); at least one.
    """

    def __init__(self, terms: Mapping[str, LowRank]) -> None:
        unique = {id(term): term for term in terms.values()}
        order = {key: place for place, key in enumerate(unique)}
        self._places = {name: order[id(term)] for name, term in terms.items()}
        pairs = [pair_of_low_rank(term) for term in unique.values()]
        self._widths = [pair.left.shape[1] for pair in pairs]
        self._left = np.concatenate([pair.left for pair in pairs], axis=1)  # (out, q)
        self._right = np.concatenate([pair.right for pair in pairs], axis=1)  # (in, q)
        self._shape = self._left.shape[0], self._right.shape[0]
        self._bases: tuple[FloatArray, FloatArray] | None = None
        if 0 < self._left.shape[1] <= _THIN * min(self._shape):
            left_basis, self._left = np.linalg.qr(self._left)
            right_basis, self._right = np.linalg.qr(self._right)
            self._bases = left_basis, right_basis

    def combine(self, coefficients: Mapping[str, float], rank_cap: int) -> tuple[LowRank, float]:
        """The sum of coefficient times term, cut to a rank.

        Args:
            coefficients: by the names of the terms; one that is absent counts as 0, and a name
                without a term adds nothing.

        Returns:
            The sum, and the share of its squared norm that the cap cut off.
        """
        weights = np.zeros(len(self._widths))
        for name, coefficient in coefficients.items():
            if name in self._places:
                weights[self._places[name]] += coefficient
        shares = np.repeat(weights, self._widths)  # (q,)
        if not shares.any():
            return empty(*self._shape), 0.0
        small, dropped = recompress([Pair(self._left * shares, self._right)], rank_cap)
        return self._lifted(small), dropped

    def _lifted(self, small: LowRank) -> LowRank:
        if self._bases is None:
            return small
        u, v = (
            np.ascontiguousarray(basis @ side.astype(np.float64), dtype=np.float32)
            for basis, side in zip(self._bases, (small.u, small.v), strict=True)
        )
        return LowRank(u=u, sigma=small.sigma, v=v)


def split(low_rank: LowRank, rank: int) -> tuple[LowRank, LowRank]:
    """The leading `rank` directions, and the others."""

    def part(chosen: slice) -> LowRank:
        u, v = (np.ascontiguousarray(side[:, chosen]) for side in (low_rank.u, low_rank.v))
        return LowRank(u=u, sigma=low_rank.sigma[chosen], v=v)

    return part(slice(rank)), part(slice(rank, None))
