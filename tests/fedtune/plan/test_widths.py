from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from fedtune.plan.widths import choose_forms, lower_hull


def bases(matrices: int, forms: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and bytes as a 7B base has them: a quarter of the MSE per bit, scattered."""
    rng = np.random.default_rng(seed)
    parameters = np.tile([4096 * 4096] * 4 + [4096 * 11008] * 3, matrices)[:matrices]
    bits = np.repeat([2.0, 3.0, 4.0, 8.0], forms // 4) + np.tile(
        np.linspace(0.05, 0.6, forms // 4), 4
    )
    sensitivity = np.exp(rng.normal(0, 1.2, (matrices, 1)))
    noise = np.exp(rng.normal(0, 0.05, (matrices, forms)))
    errors = sensitivity * 4.0**-bits * parameters[:, None] / parameters.mean() * noise
    return errors, (bits * parameters[:, None] / 8).astype(np.int64)


def optimum(
    errors: np.ndarray, sizes: np.ndarray, budget: int, relaxed: bool = False
) -> OptimizeResult:
    """The exact least total error, by HiGHS; its inputs are scaled, as it likes them."""
    matrices, forms = errors.shape
    one_each = sparse.kron(sparse.eye(matrices), np.ones((1, forms)), format="csr")
    within = sizes.reshape(1, -1) / budget
    scale = errors.max() or 1.0
    found = milp(
        c=errors.ravel() / scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, 1)],
        integrality=np.zeros(errors.size) if relaxed else np.ones(errors.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 20},
    )
    assert found.x is not None
    found.fun = float(found.fun * scale)
    return found


def total(errors: np.ndarray, chosen: np.ndarray) -> float:
    return float(errors[np.arange(len(chosen)), chosen].sum())


def spent(sizes: np.ndarray, chosen: np.ndarray) -> int:
    return int(sizes[np.arange(len(chosen)), chosen].sum())


@pytest.mark.parametrize("bits", [2.75, 4.25])
def test_the_greedy_is_within_a_third_of_a_percent_of_the_exact_solver(bits: float) -> None:
    errors, sizes = bases(224, 100, seed=0)
    budget = int(bits / 8 * 4096 * (4096 * 4 + 11008 * 3) / 7 * 224)
    chosen = choose_forms(errors, sizes, budget)
    assert chosen is not None
    assert spent(sizes, chosen) <= budget
    assert total(errors, chosen) <= 1.003 * optimum(errors, sizes, budget).fun
    assert total(errors, chosen) <= 1.0005 * optimum(errors, sizes, budget, relaxed=True).fun


def test_a_base_of_224_matrices_and_100_forms_takes_a_tenth_of_a_second() -> None:
    errors, sizes = bases(224, 100, seed=1)
    budget = int(sizes.max(axis=1).sum() / 2)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        choose_forms(errors, sizes, budget)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1


tables = st.integers(1, 6).flatmap(
    lambda forms: st.tuples(
        st.lists(
            st.lists(st.integers(0, 50), min_size=forms, max_size=forms), min_size=1, max_size=6
        ),
        st.lists(
            st.lists(st.integers(1, 40), min_size=forms, max_size=forms), min_size=6, max_size=6
        ),
    )
)


def arrays(table: tuple[list[list[int]], list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    errors, sizes = table
    return np.array(errors, dtype=np.float64), np.array(sizes[: len(errors)])


@settings(max_examples=200, deadline=None)
@given(table=tables, budget=st.integers(0, 200))
def test_the_budget_is_kept_and_none_means_that_nothing_fits(
    table: tuple[list[list[int]], list[list[int]]], budget: int
) -> None:
    errors, sizes = arrays(table)
    chosen = choose_forms(errors, sizes, budget)
    if chosen is None:
        assert sizes.min(axis=1).sum() > budget
    else:
        assert spent(sizes, chosen) <= budget


@settings(max_examples=100, deadline=None)
@given(table=tables, budget=st.integers(1, 200))
def test_the_error_is_above_the_optimum_by_less_than_one_step(
    table: tuple[list[list[int]], list[list[int]]], budget: int
) -> None:
    errors, sizes = arrays(table)
    chosen = choose_forms(errors, sizes, budget)
    if chosen is None:
        return
    hulls = [lower_hull(e, s) for e, s in zip(errors, sizes, strict=True)]
    steps = [
        errors[row, low] - errors[row, high]
        for row, hull in enumerate(hulls)
        for low, high in pairwise(hull)
    ]
    bound = optimum(errors, sizes, budget, relaxed=True).fun
    assert bound - 1e-6 <= total(errors, chosen) <= bound + max(steps, default=0.0) + 1e-6


@settings(max_examples=200, deadline=None)
@given(table=tables, budget=st.integers(0, 150), more=st.integers(0, 50))
def test_a_larger_budget_never_gives_a_larger_error(
    table: tuple[list[list[int]], list[list[int]]], budget: int, more: int
) -> None:
    errors, sizes = arrays(table)
    first, second = choose_forms(errors, sizes, budget), choose_forms(errors, sizes, budget + more)
    if first is not None:
        assert second is not None
        assert total(errors, second) <= total(errors, first) + 1e-9


@settings(max_examples=200, deadline=None)
@given(table=tables)
def test_along_a_hull_bytes_rise_and_savings_fall(
    table: tuple[list[list[int]], list[list[int]]],
) -> None:
    errors, sizes = arrays(table)
    hull = lower_hull(errors[0], sizes[0])
    assert errors[0][hull[-1]] == errors[0].min()
    assert sizes[0][hull[0]] == sizes[0].min()
    saved = []
    for low, high in pairwise(hull):
        assert sizes[0][high] > sizes[0][low]
        assert errors[0][high] < errors[0][low]
        saved.append((errors[0][low] - errors[0][high]) / (sizes[0][high] - sizes[0][low]))
    assert all(first > second for first, second in pairwise(saved))


def test_a_form_that_cannot_be_had_is_not_chosen() -> None:
    errors, sizes = np.array([[5.0, np.inf, 1.0]]), np.array([[3, 1, 9]])
    assert choose_forms(errors, sizes, 4) == [0]
    assert choose_forms(errors, sizes, 9) == [2]
    assert choose_forms(errors, sizes, 2) is None
    assert choose_forms(np.array([[np.inf]]), np.array([[1]]), 9) is None


def test_equal_matrices_are_widened_in_their_order() -> None:
    errors, sizes = np.array([[4.0, 1.0]] * 3), np.array([[1, 2]] * 3)
    chosen = choose_forms(errors, sizes, 5)
    assert chosen is not None
    assert chosen.tolist() == [1, 1, 0]
