"""What the sums of a fleet say of each further rank of each matrix.

A gain is a share of what there is to gain in the whole model, so that gains of different matrices
compare; the planner divides by what a rank costs. No torch: the coordinator reads the sums.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.importance.sketch import semidefinite_values, signs, two_sided_values
from fedtune.records import FloatArray, ImportanceReport, MatrixShape
from fedtune.wire.calibration import MeasuredMethod, left_size, sketch_size

Gains = NDArray[np.float64]
_LEAST = 1e-9
"""Smallest gain, as a share of the largest: the planner leaves out ranks that gain nothing, and a
device with memory to spare shall still have them."""
_DIGITS = 6


def measured_report(
    method: MeasuredMethod,
    sums: Mapping[str, FloatArray],
    matrices: Sequence[MatrixShape],
    rank: int,
    seed: int,
    *,
    tokens: int,
    passes: int,
) -> ImportanceReport:
    """The gain curves of every matrix.

    Args:
        sums: name, as on the wire -> sum over the devices.
        rank: directions of a matrix that were asked for; the length of a curve, at most.
        seed: of the sketches.
        tokens: that the sums rest on.
        passes: forward and backward passes that they rest on.
    """
    curve = _CURVES[method]
    found = {}
    for matrix in matrices:
        parts = {
            name.removeprefix(f"{matrix.name}."): value
            for name, value in sums.items()
            if name.rpartition(".")[0] == matrix.name
        }
        length = min(rank, matrix.out_features, matrix.in_features)
        found[matrix.name] = curve(parts, matrix, length, seed, passes)
    return ImportanceReport(comparable(found), tokens, method)


def random_report(matrices: Sequence[MatrixShape], rank: int, seed: int) -> ImportanceReport:
    """Gains that fall with the rank as the prior's do, from a drawn height: what chance gives."""
    rng = np.random.default_rng([seed, zlib.crc32(b"importance")])
    drawn = {
        matrix.name: rng.exponential() / np.arange(1, _length(matrix, rank) + 1, dtype=np.float64)
        for matrix in sorted(matrices, key=lambda matrix: matrix.name)
    }
    return ImportanceReport(comparable(drawn), 0, "random")


def _length(matrix: MatrixShape, rank: int) -> int:
    return min(rank, matrix.out_features, matrix.in_features)


def comparable(curves: Mapping[str, Gains]) -> dict[str, tuple[float, ...]]:
    """Curves as shares of all gains: positive, non-increasing, of six digits.

    Six digits, because sums of devices differ in their last ones with the order of the devices.
    """
    falling = {name: np.minimum.accumulate(curve) for name, curve in curves.items()}
    total = sum(float(curve.sum()) for curve in falling.values())
    highest = max((float(curve.max(initial=0.0)) for curve in falling.values()), default=0.0)
    if not highest > 0:
        return {name: (1.0,) * len(curve) for name, curve in falling.items()}
    floored = {name: np.maximum(curve, _LEAST * highest) for name, curve in falling.items()}
    return {
        name: tuple(float(f"{gain:.{_DIGITS - 1}e}") for gain in curve / total)
        for name, curve in floored.items()
    }


# ---------------------------------------------------------------- one per method


def _spectrum(
    parts: Mapping[str, FloatArray], matrix: MatrixShape, length: int, seed: int, passes: int
) -> Gains:
    """Singular values of the gradient, times the norm of the weights.

    A change of a matrix by a given share of it gains that much, to first order. Without the norm,
    value and key projections, whose weights are small, got ranks that were worth little.
    """
    size = sketch_size(length, matrix.out_features, matrix.in_features)
    psi = signs(seed, matrix.name, "left", left_size(size), matrix.out_features)
    norm = math.sqrt(max(float(parts["weight"][0]), 0.0) / max(1, passes))
    return norm * two_sided_values(parts["right"], parts["left"], psi)[:length]


def _sensitivity(
    parts: Mapping[str, FloatArray], matrix: MatrixShape, length: int, seed: int, passes: int
) -> Gains:
    """The sum over the entries of |W * G|, falling with the root of the rank.

    The sum says nothing of single ranks. Of 1/i, 1/sqrt(i) and 1/i^2, 1/sqrt(i) trained best on
    three tasks (docs/importance.md): it lets the matrices that matter have several ranks before
    all others have one.

    Source:
        GoRA (arXiv 2502.12171, section 3.2), which takes the mean over the entries. The mean
        favours small matrices, and the planner divides by what a rank costs as well.
    """
    total = max(float(parts["sensitivity"][0]), 0.0)
    return total / np.sqrt(np.arange(1, length + 1, dtype=np.float64))


def _activation(
    parts: Mapping[str, FloatArray], matrix: MatrixShape, length: int, seed: int, passes: int
) -> Gains:
    """Source: EVA (arXiv 2410.07170, section 3.3): share of the inputs' variance per direction."""
    size = sketch_size(length, matrix.out_features, matrix.in_features)
    omega = signs(seed, matrix.name, "inputs", matrix.in_features, size)
    values = semidefinite_values(parts["inputs"], omega)[:length]
    return values / max(float(parts["energy"][0]), 1e-30)


def _adalora(
    parts: Mapping[str, FloatArray], matrix: MatrixShape, length: int, seed: int, passes: int
) -> Gains:
    """Mean of a triplet's score over the passes, times its deviation over them.

    Source:
        AdaLoRA (arXiv 2303.10512, equations 9 to 11): sensitivity times uncertainty; there of
        moving means over steps, here of all passes.
    """
    mean = parts["score"].astype(np.float64) / passes
    square = parts["square"].astype(np.float64) / passes
    score = mean * np.sqrt(np.maximum(square - mean**2, 0.0)) if passes > 1 else mean
    return np.sort(score)[::-1]


_Curve = Callable[[Mapping[str, FloatArray], MatrixShape, int, int, int], Gains]
_CURVES: dict[MeasuredMethod, _Curve] = {
    "spectrum": _spectrum,
    "sensitivity": _sensitivity,
    "activation": _activation,
    "adalora": _adalora,
}
