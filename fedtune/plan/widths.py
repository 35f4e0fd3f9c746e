"""Which form each matrix is held in, so that the total error is least within a budget of bytes.

One form per matrix, the sum of errors as small as possible, the sum of bytes at most the budget: a
multiple-choice knapsack. The forms of a matrix that lie on the lower convex hull of (bytes, error)
are climbed step by step, the step of most error saved per byte first, over all matrices together.
That is the optimum of the linear relaxation, but for the one step at which the budget runs out; the
tests hold it against an exact solver.

Source: LQ-LoRA (https://arxiv.org/abs/2311.12023), section 3.1, poses the problem and solves it as
an integer program; the greedy on the hull is Sinha and Zoltners, The Multiple-Choice Knapsack
Problem (Operations Research 27, 1979).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def choose_forms(
    errors: Float[ndarray, "matrices forms"],
    sizes: Int[ndarray, "matrices forms"],
    budget: int,
) -> Int[ndarray, " matrices"] | None:
    """The column of the form that each matrix is held in; None if even the smallest do not fit.

    The same input gives the same answer, and a larger budget never gives a larger total error.

    Args:
        errors: of each matrix in each form, at least 0; infinite where the form cannot be had.
        sizes: bytes of each matrix in each form.
        budget: bytes of all matrices together.
    """
    hulls = [lower_hull(errors[row], sizes[row]) for row in range(len(errors))]
    if any(not hull for hull in hulls):
        return None
    chosen = np.array([hull[0] for hull in hulls], dtype=np.intp)
    left = budget - int(sizes[np.arange(len(chosen)), chosen].sum())
    if left < 0:
        return None
    full = np.zeros(len(chosen), dtype=bool)  # matrices whose next step did not fit
    for row, column in _steps(errors, sizes, hulls):
        more = int(sizes[row, column] - sizes[row, chosen[row]])
        if full[row] or more > left:
            full[row] = True
            continue
        chosen[row] = column
        left -= more
    return chosen


def lower_hull(
    errors: Float[ndarray, " forms"], sizes: Int[ndarray, " forms"] | Float[ndarray, " forms"]
) -> list[int]:
    """Forms on the lower convex hull of (bytes, error), the smallest first.

    From one to the next, bytes rise, the error falls, and the error saved per byte falls.
    """
    hull: list[int] = []
    for column in np.lexsort((errors, sizes)).tolist():
        if not np.isfinite(errors[column]):
            continue
        if hull and errors[column] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _saved(errors, sizes, hull[-1], column) >= _saved(
            errors, sizes, hull[-2], hull[-1]
        ):
            hull.pop()
        hull.append(column)
    return hull


def _steps(
    errors: Float[ndarray, "matrices forms"],
    sizes: Int[ndarray, "matrices forms"],
    hulls: list[list[int]],
) -> list[tuple[int, int]]:
    """Every step (matrix, next form) of every hull, the most error saved per byte first.

    Steps of one matrix come in the order of its hull, because there the savings fall; among equal
    savings, those of the first matrix come first.
    """
    steps = [
        (-_saved(errors[row], sizes[row], low, high), row, place, high)
        for row, hull in enumerate(hulls)
        for place, (low, high) in enumerate(pairwise(hull))
    ]
    return [(row, high) for _, row, _, high in sorted(steps)]


def _saved(
    errors: Float[ndarray, " forms"], sizes: Int[ndarray, " forms"], low: int, high: int
) -> float:
    """Error saved per byte from one form to a larger one."""
    return float(errors[low] - errors[high]) / int(sizes[high] - sizes[low])
