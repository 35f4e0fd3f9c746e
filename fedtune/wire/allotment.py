"""How many bits each direction of a message gets, where it has a few for each number.

What counts is the error of the products B A, and a direction's share of it goes with the square of
its size: the first of a trained adapter are often a hundred times as large as the last. At equal
bits the first make all the error. So the bits of a message are handed out one by one, each to the
direction whose error falls most per byte, until as many are gone as the codec has in the mean.

Source: reverse water-filling for Gaussian sources of unequal variance (Cover and Thomas, "Elements
    of Information Theory", section 10.3.3), greedily and in whole bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fedtune.coding import ALLOTTED_CODECS, BITS, MOST_BITS, SCALE_BYTES, CodecName, blocks_of

_LEFT = np.array(
    [1.0, 0.358, 0.1136, 0.0302, 0.0074, 0.00228, 0.000554, 0.000136, 0.0000338], np.float64
)
"""Squared error over squared norm of a Gaussian block, by bits; measured on 1.3 million numbers."""
_FAINT = 1e-9
"""Of the largest weight: what a direction counts that must travel, and has no size yet."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """One tensor's directions.

    Attributes:
        weights: of each direction: squared norm of its part of the product.
        length: numbers of a direction.
        needed: every direction gets a bit at least. A row of A without any would be zero, and its
            column of B could not learn.
    """

    weights: Float[np.ndarray, " rank"]
    length: int
    needed: bool = False


def allot(tensors: Mapping[str, Weighted], codec: CodecName) -> dict[str, tuple[int, ...]]:
    """Bits of each direction by tensor; nothing where the codec does not leave a choice.

    Together they take no more than all directions at the codec's own width, scales included.
    """
    if codec not in ALLOTTED_CODECS or not tensors:
        return {}
    sizes = [len(each.weights) for each in tensors.values()]
    cuts = [blocks_of((each.length,)) for each in tensors.values()]
    numbers = np.repeat([cut.count * cut.length for cut in cuts], sizes)
    scales = np.repeat([8 * SCALE_BYTES * cut.count for cut in cuts], sizes)
    needed = np.repeat([each.needed for each in tensors.values()], sizes)
    weights = np.concatenate([each.weights for each in tensors.values()]).astype(np.float64)
    floor = _FAINT * weights.max(initial=0.0) or 1.0
    weights = np.where(needed, np.maximum(weights, floor), weights)

    costs = np.tile(numbers, (MOST_BITS, 1))  # (bit, direction)
    costs[0] += scales  # the first bit of a direction brings its scales along
    worth = weights * (_LEFT[:-1] - _LEFT[1:])[:, None] / costs
    worth[0, needed] = np.inf
    order = np.argsort(-worth, axis=None, kind="stable")
    spent = np.cumsum(costs.ravel()[order])
    budget = int((BITS[codec] * numbers + scales).sum())
    taken = order[(spent <= budget) & (worth.ravel()[order] > 0)]
    bits = np.bincount(taken % len(weights), minlength=len(weights)).tolist()
    ends = np.cumsum(sizes).tolist()
    return {
        name: tuple(bits[end - size : end])
        for name, size, end in zip(tensors, sizes, ends, strict=True)
    }
