"""Random sketches of gradients that every device draws alike, and what they tell of a spectrum.

A matrix of signs comes from bits of SHAKE-128, not from a library's generator: it is the same on
every machine and with every version, and exact in every dtype that a device computes in. So the
sketches of devices add up to the sketch of the sum of their gradients.

Source:
    Halko, Martinsson, Tropp (arXiv 0909.4061) for the range of a matrix from a sketch of it; Tropp,
    Yurtsever, Udell, Cevher (arXiv 1609.00048, algorithm 4) for its factorisation from two sketches
    that are taken in one pass, there with Gaussian numbers. Signs do as well, and are cheaper.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.records import FloatArray

Side = Literal["right", "left", "inputs"]
"""What a matrix of signs is multiplied with: rows or columns of a gradient, or inputs."""


def signs(seed: int, name: str, side: Side, rows: int, columns: int) -> NDArray[np.int8]:
    """A matrix (rows, columns) of independent, equally likely -1 and 1.

    Args:
        seed: of the run.
        name: of the matrix that is sketched.
    """
    count = rows * columns
    stream = hashlib.shake_128(f"fedtune {seed} {side} {name}".encode())
    drawn = np.frombuffer(stream.digest(-(-count // 8)), dtype=np.uint8)
    bits = np.unpackbits(drawn, count=count).astype(np.int8)
    return (2 * bits - 1).reshape(rows, columns)


def two_sided_values(
    right: FloatArray, left: FloatArray, left_signs: NDArray[np.int8]
) -> NDArray[np.float64]:
    """The leading singular values of G, largest first, as many as `right` has columns.

    G is close to Q X with Q an orthonormal basis of the columns of `right`, and X the least-squares
    solution of (Psi Q) X = Psi G.

    Args:
        right: G Omega (out, k).
        left: Psi G (l, in) with l >= k.
        left_signs: Psi (l, out).
    """
    basis, _ = np.linalg.qr(right.astype(np.float64))  # (out, k)
    core = left_signs.astype(np.float64) @ basis  # (l, k)
    factor, *_ = np.linalg.lstsq(core, left.astype(np.float64), rcond=None)  # (k, in)
    found: NDArray[np.float64] = np.linalg.svd(factor, compute_uv=False)
    return found


def one_sided_values(right: FloatArray) -> NDArray[np.float64]:
    """An estimate of the leading singular values from one sketch; too large where G has a tail.

    Args:
        right: G Omega (out, k).
    """
    found = np.linalg.svd(right.astype(np.float64), compute_uv=False)
    return np.asarray(found / np.sqrt(right.shape[1]), dtype=np.float64)


def semidefinite_values(sketch: FloatArray, input_signs: NDArray[np.int8]) -> NDArray[np.float64]:
    """The leading eigenvalues of a covariance C, largest first, by Nystroem's method.

    C is close to (C Omega) (Omega^T C Omega)^+ (C Omega)^T.

    Args:
        sketch: C Omega (in, k).
        input_signs: Omega (in, k).

    Source:
        Tropp, Yurtsever, Udell, Cevher (arXiv 1706.05736, algorithm 3): a small shift keeps the
        Cholesky factorisation of the core stable, and is taken off again.
    """
    omega = input_signs.astype(np.float64)
    values = sketch.astype(np.float64)
    shift = np.finfo(np.float32).eps * max(float(np.linalg.norm(values)), 1e-30)
    shifted = values + shift * omega
    core = omega.T @ shifted
    lower = np.linalg.cholesky((core + core.T) / 2 + 1e-12 * np.trace(core) * np.eye(len(core)))
    turned = np.linalg.solve(lower, shifted.T)  # (k, in)
    singular = np.linalg.svd(turned, compute_uv=False)
    found: NDArray[np.float64] = np.maximum(singular**2 - shift, 0.0)
    return found
