"""Every way to the leading triplets finds the same ones, or says that it did not."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate.krylov import STEPS_MAX, block_size, by_krylov
from fedtune.aggregate.low_rank import ROUTES, problem_of, reduce_sum, signs
from fedtune.aggregate.route_costs import Problem, Route, by_cost, possible, route_seconds
from fedtune.aggregate.side import Side
from fedtune.aggregate.singular import by_gram, checked, factored, multiplied
from fedtune.aggregate.stack import Dense, Stack, Sum, stack_of


def falling(out_features: int, in_features: int, columns: int, seed: int = 0) -> Stack:
    """Float32 columns along shared directions of falling weight, with noise."""
    rng = np.random.default_rng(seed)
    shared = (1.0 + np.arange(24)) ** -1.0

    def side(length: int) -> np.ndarray:
        along = rng.standard_normal((length, 24)) * shared
        moved = along @ rng.standard_normal((24, columns))
        return (moved + 0.05 * rng.standard_normal((length, columns))).astype(np.float32)

    return stack_of(side(out_features), side(in_features), rng.uniform(0.1, 1.0, columns))


def low(out_features: int, in_features: int, columns: int, rank: int) -> Stack:
    """Many float64 columns whose products have few directions."""
    rng = np.random.default_rng(1)
    mix = rng.standard_normal((rank, columns))
    left = rng.standard_normal((out_features, rank)) @ mix
    return stack_of(
        left, rng.standard_normal((in_features, rank)) @ rng.standard_normal((rank, columns))
    )


def norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value))


FORMS = ["stack", "turned stack", "dense", "float64"]


def in_form(form: str, columns: int = 200) -> Sum:
    stack = falling(230, 160, columns)
    if form == "turned stack":
        return stack.transposed()
    if form == "dense":
        return Dense(stack.dense())
    if form == "float64":
        whole = slice(None)
        return stack_of(stack.left.rows(whole), stack.right.rows(whole), stack.weights)
    return stack


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", list(ROUTES))
def test_every_route_finds_the_best_directions_and_what_the_cap_drops(
    route: Route, form: str
) -> None:
    total, cap = in_form(form), 6
    u, sigma, vt = np.linalg.svd(total.dense())
    best = (u[:, :cap] * sigma[:cap]) @ vt[:cap]
    found, dropped = reduce_sum(total, cap, route)
    assert norm(found.product() - best) < 2e-4 * norm(best)
    left = norm(total.dense() - found.product()) ** 2
    assert left < (1 + 1e-5) * norm(total.dense() - best) ** 2
    assert dropped == pytest.approx(np.sum(sigma[cap:] ** 2) / np.sum(sigma**2), rel=1e-4)
    assert np.abs(found.u.T @ found.u - np.eye(cap)).max() < 1e-6


@pytest.mark.parametrize("route", list(ROUTES))
@pytest.mark.parametrize("columns", [40, 700])
def test_where_nothing_is_cut_every_route_is_exact(route: Route, columns: int) -> None:
    total = low(120, 90, columns, rank=5)
    for form in (total, Dense(total.dense())):
        found = ROUTES[route](form, 12)
        assert found is not None
        assert found.dropped == 0.0
        product = (found.u * found.sigma) @ found.v.T
        assert norm(product - total.dense()) < 5e-7 * norm(total.dense())
        assert len(found.sigma) == 5


def test_a_flat_spectrum_is_not_left_to_a_random_space() -> None:
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal((side, 900)).astype(np.float32) for side in (500, 400))
    total, cap = stack_of(left, right), 20
    assert STEPS_MAX * block_size(cap) < 400
    assert by_krylov(total, cap) is None
    found, dropped = reduce_sum(total, cap, "krylov")
    sigma = np.linalg.svd(total.dense(), compute_uv=False)
    assert np.allclose(found.sigma, sigma[:cap], rtol=1e-6)
    assert dropped == pytest.approx(np.sum(sigma[cap:] ** 2) / np.sum(sigma**2), rel=1e-6)


@pytest.mark.parametrize("route", list(ROUTES))
@pytest.mark.parametrize(("size", "cap"), [(1e-9, 12), (1e-9, 2), (1e-12, 12)])
def test_what_is_left_of_columns_that_cancel_survives(route: Route, size: float, cap: int) -> None:
    """Its square is below the rounding of the columns' own squares."""
    rng = np.random.default_rng(3)
    base, change = rng.standard_normal((50, 3)), rng.standard_normal((50, 3))
    right = rng.standard_normal((40, 3))
    total = stack_of(
        np.concatenate([-base, base + size * change], axis=1), np.concatenate([right] * 2, axis=1)
    )
    u, sigma, vt = np.linalg.svd(size * change @ right.T)
    best = (u[:, :cap] * np.append(sigma, np.zeros(cap))[:cap]) @ vt[:cap]
    found, dropped = reduce_sum(total, cap, route)
    assert norm(found.product() - best) < 1e-14 / size * norm(best)
    assert np.abs(found.u.T @ found.u - np.eye(found.rank)).max() < 1e-6
    assert dropped == pytest.approx(np.sum(sigma[cap:] ** 2) / np.sum(sigma**2), abs=1e-5)


def test_triplets_that_miss_something_pass_only_under_a_cap() -> None:
    total = falling(30, 20, 8)
    found, (energy, rounding) = factored(total, 5), total.energy()
    under_the_cap = checked(found, 5, energy, rounding)
    assert under_the_cap is not None
    assert under_the_cap.dropped == pytest.approx(found.dropped, rel=1e-9)
    assert checked(found, 6, energy, rounding) is None
    whole = factored(total, 20)
    assert checked(whole, 20, energy, rounding) is not None
    assert checked(whole, 20, energy, 1e-6 * energy) is None
    assert checked(found, 5, energy, 0.1 * energy) is None


def test_directions_far_below_the_largest_survive() -> None:
    rng = np.random.default_rng(4)
    u = np.linalg.qr(rng.standard_normal((80, 6)))[0]
    v = np.linalg.qr(rng.standard_normal((70, 6)))[0]
    sigma = 10.0 ** -np.arange(6)
    total = stack_of(u, v, sigma)
    for found in (factored(total, 20), multiplied(total, 20), by_gram(total, 20)):
        assert found is not None
        assert np.allclose(found.sigma, sigma, rtol=1e-6)
        assert np.abs(np.abs(np.sum(found.u * u, axis=0)) - 1).max() < 1e-6


@pytest.mark.parametrize("columns", [20, 400])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_energy_is_the_squared_norm_and_its_rounding_is_bounded(
    columns: int, dtype: type[np.floating]
) -> None:
    total = falling(90, 60, columns)
    expected = norm(total.dense()) ** 2
    for form in (total, Dense(total.dense())):
        energy, rounding = form.energy(dtype)
        assert abs(energy - expected) <= rounding
        assert rounding < (1e-4 if dtype == np.float32 else 1e-12) * expected


def test_the_energy_of_blocks_of_columns_is_that_of_all() -> None:
    total = falling(2000, 1500, 600)  # three blocks, and too few columns to go by rows
    assert total.energy()[0] == pytest.approx(norm(total.dense()) ** 2, rel=1e-12)


def test_pieces_of_a_side_are_one_side() -> None:
    rng = np.random.default_rng(5)
    pieces = [rng.standard_normal((3000, columns)).astype(np.float32) for columns in (3, 7, 2)]
    side, whole = Side(tuple(pieces)), np.concatenate(pieces, axis=1)
    weights, x, y = (
        rng.uniform(size=12),
        rng.standard_normal((12, 4)),
        rng.standard_normal((3000, 4)),
    )
    assert np.allclose(side.times(x), whole @ x)
    assert np.allclose(side.transposed_times(y), whole.T @ y)
    assert side.times(x.astype(np.float32)).dtype == np.float32
    assert np.array_equal(side.some(slice(2, 11), np.float64), whole[:, 2:11])
    kept = np.arange(12) % 3 != 0
    assert np.array_equal(side.only(kept).rows(slice(0, 9)), whole[:9, kept])
    triangle = side.triangle(weights)  # three blocks of rows
    assert np.allclose(triangle.T @ triangle, (whole * weights).T @ (whole * weights))
    assert not np.tril(triangle, -1).any()


def test_columns_that_add_nothing_are_left_out() -> None:
    total = falling(30, 20, 8)
    left, right = total.left.rows(slice(None)), total.right.rows(slice(None))
    weights = total.weights.copy()
    left[:, 1], right[:, 3], weights[5] = 0.0, 0.0, 0.0
    kept = stack_of(left, right, weights).alive()
    assert kept.columns == 5
    assert np.allclose(kept.dense(), stack_of(left, right, weights).dense())


def test_the_sign_goes_by_the_entry_of_largest_size() -> None:
    u = np.float32([[1, -3, 2, -2], [2, 1, -2, 2], [-4, 2, 0, 0]])
    assert np.array_equal(signs(u), [-1, -1, 1, -1])
    assert np.array_equal(signs(-u), [1, 1, -1, 1])


@pytest.mark.parametrize(
    ("problem", "route"),
    [
        (Problem(4096, 4096, 308, 64), "factored"),
        (Problem(11008, 4096, 308, 64), "factored"),
        (Problem(4096, 4096, 2504, 64), "krylov"),
        (Problem(4096, 4096, None, 64), "krylov"),
        (Problem(4096, 4096, 1000, 1000), "factored"),
        (Problem(1024, 1024, 1200, 256), "gram"),
        (Problem(64, 172, 16, 8), "factored"),
    ],
)
def test_thin_stacks_are_factored_thick_ones_searched_or_multiplied_out(
    problem: Problem, route: Route
) -> None:
    assert by_cost(problem)[0] == route
    seconds = [route_seconds(problem, each) for each in by_cost(problem)]
    assert seconds == sorted(seconds)


def test_a_space_needs_a_cap_well_below_the_rank() -> None:
    assert "krylov" not in possible(Problem(512, 512, 300, 512))
    assert "krylov" in possible(Problem(512, 512, 300, 32))
    assert "factored" not in possible(Problem(512, 512, None, 32))


def test_the_model_is_told_what_a_sum_is() -> None:
    total = falling(30, 20, 8)
    assert problem_of(total, 4) == Problem(30, 20, 8, 4, single=True)
    assert problem_of(Dense(total.dense()), 4) == Problem(30, 20, None, 4, single=False)
