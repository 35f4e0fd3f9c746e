"""How much of a matrix is lost in each form it could be held in: the input of the widths' choice.

One matrix at a time, so that a base of any size is measured in the memory of one of its matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from fedtune.quant.correction import squared_error, store_corrected
from fedtune.records import DistortionTable, MatrixForm


def measure_distortion(
    matrices: Iterable[tuple[str, Tensor]],
    forms: Sequence[MatrixForm],
    base_digest: str,
    on_matrix: Callable[[str], None] = lambda name: None,
) -> DistortionTable:
    """The squared error of every matrix in every form, after correction.

    Args:
        matrices: name and weight (out, in), one after the other.
        on_matrix: told the name of each matrix that is done.
    """
    errors: dict[str, tuple[float, ...]] = {}
    for name, weight in matrices:
        errors[name] = tuple(distortion(weight, form) for form in forms)
        on_matrix(name)
    return DistortionTable(base_digest, tuple(forms), errors)


def distortion(
    weight: Float[Tensor, "out in"],
    form: MatrixForm,
    row_weights: Float[Tensor, " out"] | None = None,
    column_weights: Float[Tensor, " in"] | None = None,
) -> float:
    """Squared error of one matrix in one form, weighted as `store_corrected` says.

    Infinite where the correction would have the full rank of the matrix: then it is the matrix.
    """
    if 0 < form.correction_rank >= min(weight.shape):
        return math.inf
    stored, pair = store_corrected(weight, form, row_weights, column_weights)
    return squared_error(weight, stored, pair, row_weights, column_weights)
