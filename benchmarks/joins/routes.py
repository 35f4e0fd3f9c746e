"""Every way to compute a join, at twenty sizes, and the rates of the kernels beneath."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from fedtune.aggregate.low_rank import ROUTES, problem_of
from fedtune.aggregate.route_costs import Route, by_cost, possible, route_seconds
from fedtune.aggregate.side import Side
from fedtune.aggregate.stack import Dense, Sum, stack_of

SIZES = (
    # out, in, stacked columns, cap; 0 columns: multiplied out already
    (64, 64, 48, 16),
    (64, 172, 120, 32),
    (172, 64, 400, 32),
    (256, 256, 64, 32),
    (384, 384, 300, 32),
    (384, 1536, 300, 64),
    (384, 384, 1500, 16),
    (768, 768, 200, 32),
    (768, 768, 700, 32),
    (768, 3072, 2000, 64),
    (1024, 1024, 1200, 256),
    (1024, 1024, 0, 64),
    (1024, 4096, 600, 64),
    (2048, 2048, 300, 64),
    (2048, 2048, 1500, 64),
    (2048, 5504, 1000, 32),
    (4096, 4096, 308, 64),
    (4096, 4096, 2504, 64),
    (11008, 4096, 308, 64),
    (11008, 4096, 2504, 64),
)
HOPELESS = 8.0
"""A route whose modelled seconds are so many times the least is not run above 4 s."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One size: seconds by route, and the route that is picked."""

    size: tuple[int, int, int, int]
    seconds: dict[Route, float]
    modelled: dict[Route, float]
    picked: Route

    @property
    def loss(self) -> float:
        """Seconds of the picked route over those of the best."""
        return self.seconds[self.picked] / min(self.seconds.values())


def sum_of(out_features: int, in_features: int, columns: int, seed: int = 0) -> Sum:
    """Columns as those of a round: directions that are shared, of falling weight, and noise."""
    rng = np.random.default_rng(seed)
    shared = min(96, out_features // 2, in_features // 2)
    falling = ((1.0 + np.arange(shared)) ** -0.7).astype(np.float32)
    count = columns or min(out_features, in_features)

    def side(length: int) -> np.ndarray:
        along = rng.standard_normal((length, shared), np.float32) * falling
        mixed = along @ rng.standard_normal((shared, count), np.float32) / shared**0.5
        return mixed + 0.1 * rng.standard_normal((length, count), np.float32)

    stack = stack_of(side(out_features), side(in_features), np.full(count, 1.0 / count))
    return stack if columns else Dense(stack.dense())


def timed(size: tuple[int, int, int, int]) -> Timed:
    """Processor seconds of one thread for each route, the least of some times."""
    out_features, in_features, columns, cap = size
    total = sum_of(out_features, in_features, columns)
    problem = problem_of(total, cap)
    modelled = {route: route_seconds(problem, route) for route in possible(problem)}
    least = min(modelled.values())
    seconds: dict[Route, float] = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for route, expected in modelled.items():
            if expected > max(4.0, HOPELESS * least):
                continue
            times = 1 if expected > 4 else 3 if expected > 0.2 else 7
            seconds[route] = least_seconds(lambda: ROUTES[route](total, cap), times)  # noqa: B023
    return Timed(size, seconds, modelled, by_cost(problem)[0])


def least_seconds(work: Callable[[], object], times: int) -> float:
    """Processor seconds of this thread: other processes on the machine do not count."""
    found = []
    for _ in range(times):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found)


def rates(sides: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)) -> list[dict[str, object]]:
    """1e9 flops per second of each kernel by the smaller side, in the counts of the cost model."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    with threadpool_limits(limits=1, user_api="blas"):
        for n in sides:
            square = rng.standard_normal((n, n))
            single, tall = square.astype(np.float32), rng.standard_normal((4 * n, n))
            symmetric = square @ square.T
            kernels: dict[str, tuple[float, Callable[[], object]]] = {
                "product": (2 * n**3, lambda: square @ square),  # noqa: B023
                "product, float32": (2 * n**3, lambda: single @ single),  # noqa: B023
                "Gram matrix": (n**3, lambda: square.T @ square),  # noqa: B023
                "QR": (2 * n**2 * (4 * n - n / 3), lambda: Side((tall,)).triangle()),  # noqa: B023
                "SVD": (22 * n**3, lambda: np.linalg.svd(square)),  # noqa: B023
                "eigenvectors": (9 * n**3, lambda: np.linalg.eigh(symmetric)),  # noqa: B023
            }
            row: dict[str, object] = {"side": n}
            for name, (flops, kernel) in kernels.items():
                kernel()
                taken = least_seconds(kernel, 2 if n > 1024 else 5)
                row[name] = f"{flops / taken / 1e9:.1f}"
            rows.append(row)
    return rows
