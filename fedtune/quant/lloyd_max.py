"""Codebooks of least squared error for Gaussian weights in blocks that their maximum scales.

In a block of B independent Gaussian weights with largest magnitude a, one weight is a itself; the
others are Gaussian, cut off at a. Divided by a, a weight's magnitude t therefore has density

    f(t) = a phi(a t) / (Phi(a) - 1/2) (B - 1) / B  on 0 <= t < 1,  and a mass of 1 / B at t = 1.

An error in t is multiplied by a when the weight is scaled back, so f is averaged over the
distribution of a with weight a^2. Lloyd's iteration on that average gives the levels. They lie
symmetrically around 0, so the positive half is enough; there is no level at 0.

Source: Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982), section V;
Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)", arXiv 2306.06965, for the
distribution under a block's maximum. The weight a^2 is ours: without it the levels are best for
scaled weights, and not for the weights.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

LARGEST = 9.0
"""Beyond this many standard deviations a block's maximum is taken never to lie."""


def lloyd_max_levels(
    bits: int, block: int, cells: int = 16384, nodes: int = 600, most_steps: int = 2000
) -> Vector:
    """The positive levels, ascending; the others are their negatives.

    Args:
        block: weights that share a scale, at least 2.
        cells: intervals of 0..1 on which the density is taken as constant.
        nodes: points of the Gauss-Legendre rule over the block's maximum.
    """
    density, tip = _density(block, cells, nodes)
    edges = np.linspace(0.0, 1.0, cells + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    # Mass and first moment up to each edge; the weight that is the maximum sits past the last one.
    mass = np.concatenate([[0.0], np.cumsum(density)])
    moment = np.concatenate([[0.0], np.cumsum(density * centres)])
    levels = _companded(centres, density, 2 ** (bits - 1))
    for _ in range(most_steps):
        borders = (levels[1:] + levels[:-1]) / 2
        masses = np.diff([0.0, *np.interp(borders, edges, mass), mass[-1] + tip])
        moments = np.diff([0.0, *np.interp(borders, edges, moment), moment[-1] + tip])
        better = moments / masses
        step = float(np.abs(better - levels).max())
        levels = better
        if step < 1e-12:
            break
    return levels


def _density(block: int, cells: int, nodes: int) -> tuple[Vector, float]:
    """Mass of each cell, and the mass at 1, both averaged over the maximum a with weight a^2."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    maximum = (points + 1) / 2 * LARGEST
    inside = np.array([math.erf(a / math.sqrt(2.0)) for a in maximum])  # P(|x| < a)
    of_maximum = block * inside ** (block - 1) * 2 * _phi(maximum)
    weighted = of_maximum * maximum**2 * weights * LARGEST / 2
    share = weighted * (block - 1) / block / inside
    centres = (np.arange(cells) + 0.5) / cells
    mass = np.zeros(cells)
    for a, s in zip(maximum, share, strict=True):
        mass += s * 2 * a * _phi(a * centres) / cells
    return mass, float(weighted.sum()) / block


def _companded(centres: Vector, density: Vector, levels: int) -> Vector:
    """Where many levels would lie: as dense as the cube root of the density."""
    cumulated = np.cumsum(np.cbrt(density))
    places = (np.arange(levels) + 0.5) / levels * cumulated[-1]
    return np.asarray(np.interp(places, cumulated, centres), dtype=np.float64)


def _phi(x: Vector) -> Vector:
    result: Vector = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return result
