"""Lengths and inner products from factors agree with those of the dense products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.aggregate import geometry
from fedtune.aggregate.geometry import Geometry, difference
from fedtune.records import AdapterUpdate, Contribution, Dispatch, LoraFactors

SHAPES = {"up": (14, 9), "down": (9, 14)}


def factors(
    rng: np.random.Generator, name: str, rank: int, scale: float, size: float = 1.0
) -> LoraFactors:
    out_features, in_features = SHAPES[name]
    a = size * rng.standard_normal((rank, in_features))
    b = size * rng.standard_normal((out_features, rank))
    return LoraFactors(a.astype(np.float32), b.astype(np.float32), scale)


def contribution(seed: int, ranks: dict[str, int], head: bool = True) -> Contribution:
    rng = np.random.default_rng(seed)
    sent = {name: factors(rng, name, rank, 2.0) for name, rank in ranks.items()}
    returned = {name: factors(rng, name, rank, 2.0) for name, rank in ranks.items()}
    heads = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(2)]
    before, after = ({"head": heads[0]}, {"head": heads[1]}) if head else ({}, {})
    update = AdapterUpdate("run", 1, f"d{seed}", "0", returned, after, samples=1, tokens=1)
    return Contribution(1.0, Dispatch(trained=sent, dense=before), update)


def unequal() -> list[Contribution]:
    """Five devices of different ranks; two lack a matrix and one has no head."""
    return [
        contribution(0, {"up": 2, "down": 3}),
        contribution(1, {"up": 5}),
        contribution(2, {"up": 1, "down": 1}, head=False),
        contribution(3, {"down": 6}),
        contribution(4, {"up": 4, "down": 2}),
    ]


def dense(each: Contribution) -> np.ndarray:
    """All that a device changed, as one long vector; zero where it trains nothing."""
    parts = []
    for name, shape in SHAPES.items():
        change = np.zeros(shape)
        if name in each.update.factors:
            change = each.update.factors[name].product() - each.sent.trained[name].product()
        parts.append(change.ravel())
    head = np.zeros((3, 4))
    if each.update.dense:
        head = each.update.dense["head"].astype(np.float64) - each.sent.dense["head"]
    return np.concatenate([*parts, head.ravel()])


def expected(contributions: list[Contribution]) -> np.ndarray:
    rows = np.stack([dense(each) for each in contributions])
    return np.asarray(rows @ rows.T)


@pytest.mark.parametrize("most", [10**6, 5])
def test_inner_products_of_unequal_devices_are_those_of_their_products(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Also where only one or two devices' columns are in memory at a time."""
    monkeypatch.setattr(geometry, "_MOST_COLUMNS", most)
    monkeypatch.setattr(geometry, "_MOST_VALUES", most)
    contributions = unequal()
    found = Geometry(contributions).products()
    np.testing.assert_allclose(found, expected(contributions), rtol=1e-12)
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("most", [10**6, 5])
@pytest.mark.parametrize("pairs", [True, False])
def test_lengths_and_sums_do_not_depend_on_the_way_they_are_computed(
    monkeypatch: pytest.MonkeyPatch, most: int, pairs: bool
) -> None:
    monkeypatch.setattr(geometry, "_MOST_COLUMNS", most)
    monkeypatch.setattr(geometry, "_MOST_VALUES", most)
    monkeypatch.setattr(Geometry, "_pairs_are_cheap", lambda self: pairs)
    contributions = unequal()
    products, coefficients = expected(contributions), np.array([0.1, -2.0, 0.3, 0.0, 1.0])
    space = Geometry(contributions)
    np.testing.assert_allclose(space.lengths(), np.sqrt(np.diag(products)), rtol=1e-12)
    np.testing.assert_allclose(
        space.with_sum(coefficients), products @ coefficients, rtol=1e-10, atol=1e-10
    )
    for place in range(5):
        np.testing.assert_allclose(space.with_device(place), products[place], atol=1e-10)


def test_what_would_take_too_long_is_estimated_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geometry, "_MOST_MULTIPLICATIONS", 0)
    contributions = [contribution(seed, {"up": 3, "down": 2}) for seed in range(40)]
    products, mean = expected(contributions), np.full(40, 1 / 40)
    found = Geometry(contributions).with_sum(mean)
    assert np.array_equal(found, Geometry(contributions).with_sum(mean))
    scale = np.sqrt(np.diag(products) * (mean @ products @ mean))
    errors = (found - products @ mean) / scale
    assert 0 < np.abs(errors).mean() < 0.1
    np.testing.assert_allclose(Geometry(contributions).with_device(7), products[7], atol=1e-9)


def test_few_devices_are_compared_in_pairs_and_many_with_their_sum() -> None:
    few = [contribution(seed, {"up": 1}) for seed in range(3)]
    many = [contribution(seed, {"up": 4}) for seed in range(20)]
    assert Geometry(few)._pairs_are_cheap()
    assert not Geometry(many)._pairs_are_cheap()


def test_another_basis_of_the_same_product_changes_nothing() -> None:
    """(B M, M^-1 A) is the same update, and statistics of A and B apart would not see that."""
    contributions = unequal()
    pair = contributions[1].update.factors["up"]
    mix = np.random.default_rng(9).standard_normal((5, 5))
    turned = LoraFactors(
        (np.linalg.inv(mix) @ pair.a).astype(np.float32),
        (pair.b @ mix).astype(np.float32),
        pair.scale,
    )
    update = replace(contributions[1].update, factors={"up": turned})
    other = [*contributions]
    other[1] = replace(contributions[1], update=update)
    np.testing.assert_allclose(
        Geometry(other).products(), Geometry(contributions).products(), rtol=1e-4, atol=1e-4
    )


def test_a_small_change_of_a_large_start_keeps_its_digits() -> None:
    """[s B, -s B0] would lose them: what it adds up is 1e12 times as large as what is left."""
    rng = np.random.default_rng(0)
    sent = factors(rng, "up", 3, 2.0, size=30.0)
    b = sent.b.astype(np.float64)
    step = 2.0**-12 * np.abs(b).max() * rng.choice([-1.0, 1.0], b.shape)
    returned = LoraFactors(sent.a, (b + step).astype(np.float32), 2.0)
    exact = 2.0 * (returned.b.astype(np.float64) - b) @ sent.a.astype(np.float64)
    pair = difference(sent, returned)
    np.testing.assert_allclose(pair.left @ pair.right.T, exact, rtol=1e-13)
    update = AdapterUpdate("run", 1, "d", "0", {"up": returned}, {}, samples=1, tokens=1)
    one = Geometry([Contribution(1.0, Dispatch({"up": sent}), update)])
    assert one.lengths()[0] == pytest.approx(np.linalg.norm(exact), rel=1e-13)
