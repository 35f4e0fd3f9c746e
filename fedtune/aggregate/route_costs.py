"""Which way to compute the leading singular triplets of a sum costs least, by a model of seconds.

Leading flops alone mislead: on one core, a product of float64 matrices runs three times as fast as
a QR of a hundred columns. So every kernel has its own rate, `flops / (RATE * n / (n + HALF))` with
n the smaller side: small matrices run slower. Rates are those of one thread of an AMD EPYC with
AVX-512 and OpenBLAS 0.3.31, fitted to processor seconds of each kernel alone at sides of 32 to 2440
(`python benchmarks/aggregate.py --rates`). Other machines are faster or slower as a whole; what
picks the route is the ratios. At each of twenty sizes, the route that the model picks takes at most
1.3 times the seconds of the best one (docs/benchmarks.md).

With M x N the shape (M >= N), q stacked columns and R directions kept:

    factored   QR of both sides without Q, product of the triangles, SVD of the core, triplets
    multiplied the product, SVD of M x N
    gram       the product and its Gram matrix, eigenvectors of N x N, one product with R vectors
    krylov     a few products with R/2 vectors, energy of the factors, three products with R
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedtune.aggregate.krylov import OVERSAMPLE, block_size
from fedtune.aggregate.side import triangle_rows
from fedtune.aggregate.singular import MULTIPLIED_VALUES

Route = Literal["factored", "multiplied", "gram", "krylov"]

EXACT: tuple[Route, ...] = ("factored", "multiplied")
"""Routes that always answer."""


@dataclass(frozen=True, slots=True)
class Rate:
    """flops per second at large sides, the side at half of it, and seconds of a call."""

    flops_per_s: float
    half_side: float
    call_s: float

    def seconds(self, flops: int | float, side: int | float) -> float:
        return flops / self.flops_per_s * (1 + self.half_side / side) + self.call_s


PRODUCT = Rate(45e9, 24.0, 5e-6)
PRODUCT_FLOAT32 = Rate(95e9, 24.0, 5e-6)
GRAM = Rate(38e9, 40.0, 5e-6)
QR = Rate(37e9, 245.0, 20e-6)
SVD = Rate(50e9, 200.0, 30e-6)
EIGH = Rate(50e9, 200.0, 30e-6)

CONVERTED_PER_S = 1e9
"""Stacked float32 values that become float64 in a second."""

KRYLOV_STEPS = 7
"""Steps that joined adapters take, whose devices share directions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A sum to be cut.

    Attributes:
        columns: that are stacked; None where the sum is multiplied out already.
        single: whether the columns are float32.
    """

    out_features: int
    in_features: int
    columns: int | None
    rank_cap: int
    single: bool = True

    @property
    def small(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def large(self) -> int:
        return max(self.out_features, self.in_features)

    @property
    def kept(self) -> int:
        """Directions that may stay."""
        bound = self.small if self.columns is None else min(self.small, self.columns)
        return min(self.rank_cap, bound)


def by_cost(problem: Problem) -> tuple[Route, ...]:
    """The routes that can answer, by modelled seconds."""
    return tuple(sorted(possible(problem), key=lambda route: route_seconds(problem, route)))


def possible(problem: Problem) -> tuple[Route, ...]:
    """Routes that can answer; a Krylov space needs a cap well below the rank there may be."""
    bound = problem.small if problem.columns is None else min(problem.small, problem.columns)
    routes: list[Route] = ["multiplied", "gram"]
    if problem.columns is not None:
        routes.insert(0, "factored")
    if 4 * (problem.rank_cap + OVERSAMPLE) < bound:
        routes.append("krylov")
    return tuple(routes)


def route_seconds(problem: Problem, route: Route) -> float:
    """Modelled seconds of a route on one thread."""
    match route:
        case "factored":
            return _factored(problem)
        case "multiplied":
            return _multiply(problem) + _svd(problem.large, problem.small)
        case "gram":
            return _gram(problem)
        case "krylov":
            return _krylov(problem)


def _factored(problem: Problem) -> float:
    q = problem.columns or 0
    sides = (problem.out_features, problem.in_features)
    core = [min(side, q) for side in sides]
    return (
        sum(_qr(side, q) for side in sides)
        + _product(core[0], q, core[1])
        + _svd(max(core), min(core))
        + 2 * _product(q, q, problem.kept)
        + sum(_product(side, q, problem.kept) for side in sides)
        + 2 * _conversion(problem)
    )


def _gram(problem: Problem) -> float:
    n, kept = problem.small, problem.kept
    at_once = problem.small * problem.large <= MULTIPLIED_VALUES
    return (
        _multiply(problem)
        + GRAM.seconds(problem.large * n**2, n)
        + EIGH.seconds(9 * n**3, n)
        + (_product(problem.large, n, kept) if at_once else _apply(problem, kept))
        + 2 * _qr(problem.large, kept)
    )


def _krylov(problem: Problem) -> float:
    size, kept = block_size(problem.rank_cap), problem.rank_cap + OVERSAMPLE
    space = KRYLOV_STEPS * size
    rate = PRODUCT_FLOAT32 if problem.single and problem.columns is not None else PRODUCT
    passes = (2 * KRYLOV_STEPS + 1) * _apply(problem, size, rate)
    orthogonal = rate.seconds(
        space**2 * (4 * problem.out_features + problem.in_features), size
    ) + KRYLOV_STEPS * 2 * _qr(problem.out_features, size)
    checks = sum(
        EIGH.seconds(9 * (step * size) ** 3, step * size) for step in range(4, KRYLOV_STEPS + 1)
    )
    last = 4 * _apply(problem, kept) + 4 * _qr(problem.out_features, kept)
    last += 4 * _qr(problem.in_features, kept) + _svd(kept, kept)
    return passes + orthogonal + checks + last + _energy(problem, rate)


def _energy(problem: Problem, rate: Rate) -> float:
    if problem.columns is None:
        return PRODUCT.seconds(2 * problem.small * problem.large, 16)
    q, both = problem.columns, problem.out_features + problem.in_features
    by_columns, by_rows = both * q**2, 2 * problem.out_features * problem.in_features * q
    return rate.seconds(min(by_columns, by_rows), min(q, 256))


def _apply(problem: Problem, vectors: int, rate: Rate = PRODUCT) -> float:
    """The sum times some vectors."""
    if problem.columns is None:
        return rate.seconds(2 * problem.small * problem.large * vectors, vectors)
    both = problem.out_features + problem.in_features
    flops = 2 * both * problem.columns * vectors
    converted = _conversion(problem) if rate is PRODUCT else 0.0
    return rate.seconds(flops, min(vectors, problem.columns)) + converted


def _multiply(problem: Problem) -> float:
    if problem.columns is None:
        return 0.0
    whole = _product(problem.out_features, problem.columns, problem.in_features)
    return whole + _conversion(problem)


def _conversion(problem: Problem) -> float:
    """All columns to float64, once."""
    if problem.columns is None or not problem.single:
        return 0.0
    return (problem.out_features + problem.in_features) * problem.columns / CONVERTED_PER_S


def _product(rows: int, inner: int, columns: int) -> float:
    return PRODUCT.seconds(2 * rows * inner * columns, min(rows, inner, columns))


def _qr(rows: int, columns: int) -> float:
    """Householder QR without Q, as `triangle` does it.

    Golub and Van Loan, Matrix Computations, 4th ed., section 5.2.
    """
    block = min(rows, triangle_rows(columns))
    small, large = sorted((block, columns))
    first = 2 * small**2 * (large - small / 3)
    again = (rows - block) / block * 2 * columns**2 * (block + 2 * columns / 3)
    return QR.seconds(first + again, small)


def _svd(large: int, small: int) -> float:
    """All singular vectors; Golub and Van Loan, section 8.6. LAPACK first takes a QR of a matrix
    that is much longer than wide, and multiplies by its Q in the end."""
    if large < 11 * small // 6:
        return SVD.seconds(4 * large * small**2 + 18 * small**3, small)
    longer = QR.seconds(4 * small**2 * (large - small / 3), small)
    return longer + _product(large, small, small) + SVD.seconds(22 * small**3, small)
