"""What the rule `delta` adds to the shared identities: folding, tails, caps, long runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedtune.aggregate.contributions import ordered_shares
from fedtune.aggregate.delta import Delta, join_differences, truncation_rank
from fedtune.aggregate.modules import for_each
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    GlobalAdapter,
    LoraFactors,
    LoraScale,
    MatrixPlan,
    MatrixShape,
)
from fedtune.wire.tensors import ReadOnAsking

SHAPE = MatrixShape("w", 80, 60, 0)
STEP = 0.05


def plan(device: str, rank: int, tail: int = 0) -> DevicePlan:
    return DevicePlan(device, (MatrixPlan("w", rank, "fp32", tail_rank=tail),), 1, 1, 8, 1)


def send(rule: Delta, adapter: GlobalAdapter, device: DevicePlan, seed: int = 0) -> Dispatch:
    return rule.dispatch(adapter, device, scale=2.0, rng=np.random.default_rng(seed))


def train(device: str, sent: Dispatch, seed: int, weight: float = 1.0) -> Contribution:
    rng = np.random.default_rng(seed)
    factors = {
        name: LoraFactors(
            a=(f.a + STEP * rng.standard_normal(f.a.shape)).astype(np.float32),
            b=(f.b + STEP * rng.standard_normal(f.b.shape)).astype(np.float32),
            scale=f.scale,
        )
        for name, f in sent.trained.items()
    }
    update = AdapterUpdate("run", 1, device, "0", factors, {}, samples=1, tokens=1)
    return Contribution(weight=weight, sent=sent, update=update)


def rounded(sent: Dispatch) -> Dispatch:
    """What a float16 wire makes of it."""
    trained = {
        name: LoraFactors(
            f.a.astype(np.float16).astype(np.float32),
            f.b.astype(np.float16).astype(np.float32),
            f.scale,
        )
        for name, f in sent.trained.items()
    }
    return replace(sent, trained=trained)


def warm_state(rule: Delta, rank: int = 16) -> GlobalAdapter:
    adapter = rule.start([SHAPE], {})
    return rule.join(adapter, [train("d", send(rule, adapter, plan("d", rank)), seed=1)])


def reference(adapter: GlobalAdapter, contributions: list[Contribution]) -> np.ndarray:
    total = sum(c.weight for c in contributions)
    product = adapter.matrices["w"].product()
    for c in contributions:
        change = c.update.factors["w"].product() - c.sent.trained["w"].product()
        product = product + c.weight / total * change
    return product


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_unequal_ranks_add_exactly_their_differences(wire: str) -> None:
    rule = Delta(rank_cap=60)
    adapter = warm_state(rule)
    contributions = []
    for index, rank in enumerate((2, 8, 30)):
        sent = send(rule, adapter, plan(f"d{index}", rank))
        sent = rounded(sent) if wire == "float16" else sent
        contributions.append(train(f"d{index}", sent, seed=10 + index, weight=1.0 + index))
    joined = rule.join(adapter, contributions)
    assert error(joined.matrices["w"].product(), reference(adapter, contributions)) < 1e-6


def test_what_was_sent_folds_into_the_state_exactly_when_it_is_a_truncation() -> None:
    rule = Delta(rank_cap=60)
    adapter = warm_state(rule)
    state = adapter.matrices["w"]
    warm = send(rule, adapter, plan("d", 4)).trained["w"]
    filled = send(rule, adapter, plan("d", 20)).trained["w"]
    other = rounded(send(rule, adapter, plan("d", 4))).trained["w"]
    assert truncation_rank(state, warm) == 4
    assert truncation_rank(state, filled) == 16  # four directions are fresh and send nothing
    assert truncation_rank(state, other) is None
    assert truncation_rank(state, replace(warm, a=warm.a * np.float32(1.5))) is None
    assert truncation_rank(state, replace(warm, b=warm.b * np.float32(1.5))) is None
    assert truncation_rank(warm_state(rule, 2).matrices["w"], warm) is None


def test_the_cap_drops_the_directions_of_least_energy_and_reports_their_share() -> None:
    wide = Delta(rank_cap=60)
    adapter = warm_state(wide)
    contributions = [train("d", send(wide, adapter, plan("d", 16)), seed=3)]
    exact = wide.join(adapter, contributions)
    capped = Delta(rank_cap=5).join(adapter, contributions)
    u, sigma, vt = np.linalg.svd(reference(adapter, contributions))
    best = (u[:, :5] * sigma[:5]) @ vt[:5]
    assert exact.dropped_energy["w"] == 0.0
    assert capped.matrices["w"].rank == 5
    assert error(capped.matrices["w"].product(), best) < 1e-6
    share = float(np.sum(sigma[5:] ** 2) / np.sum(sigma**2))
    assert capped.dropped_energy["w"] == pytest.approx(share, rel=1e-5)


def test_a_tail_cancels_out_of_the_join() -> None:
    rule = Delta(rank_cap=60)
    adapter = warm_state(rule)
    bare = train("d", send(rule, adapter, plan("d", 4)), seed=5)
    tailed = train("d", send(rule, adapter, plan("d", 4, tail=8)), seed=5)
    assert tailed.sent.tail["w"].rank == 8
    left, right = (rule.join(adapter, [c]).matrices["w"] for c in (bare, tailed))
    assert np.array_equal(left.u, right.u)
    assert np.array_equal(left.sigma, right.sigma)


def test_nearly_collinear_stacks_stay_accurate_over_many_rounds() -> None:
    """Fifty rounds of tiny steps of 8 devices, against the dense sum in float64."""
    rule = Delta(rank_cap=60)
    adapter = warm_state(rule)
    dense = adapter.matrices["w"].product()
    for round_index in range(50):
        contributions = []
        for index in range(8):
            sent = send(rule, adapter, plan(f"d{index}", 8 + index), seed=round_index)
            factors = {
                name: LoraFactors(
                    f.a * np.float32(1 + 1e-5 * index), f.b * np.float32(1 - 2e-5), f.scale
                )
                for name, f in sent.trained.items()
            }
            update = AdapterUpdate("run", 1, f"d{index}", "0", factors, {}, 1, 1)
            contributions.append(Contribution(1.0, sent, update))
        dense = dense + (reference(adapter, contributions) - adapter.matrices["w"].product())
        adapter = rule.join(adapter, contributions)
    assert error(adapter.matrices["w"].product(), dense) < 5e-6
    assert adapter.matrices["w"].rank <= 17


def test_factored_and_multiplied_routes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Delta(rank_cap=20)
    adapter = warm_state(rule)
    contributions = [
        train(f"d{i}", send(rule, adapter, plan(f"d{i}", 4 + i)), seed=20 + i) for i in range(3)
    ]
    shares = ordered_shares(adapter, contributions)
    found = {}
    for route in ("factored", "multiplied"):
        monkeypatch.setattr("fedtune.aggregate.low_rank.by_cost", lambda *_, route=route: (route,))
        found[route] = join_differences("w", adapter.matrices["w"], shares, 20)
    products = [low_rank.product() for low_rank, _ in found.values()]
    assert error(products[0], products[1]) < 1e-6
    assert found["factored"][1] == pytest.approx(found["multiplied"][1], rel=1e-6)


def test_fresh_rank_keeps_room_for_new_directions() -> None:
    adapter = warm_state(Delta(rank_cap=60))
    sent = send(Delta(rank_cap=60, fresh_rank=3), adapter, plan("d", 8, tail=20))
    factors = sent.trained["w"]
    assert not factors.b[:, 5:].any()
    assert factors.b[:, :5].any(axis=0).all()
    assert sent.tail["w"].rank == 16 - 5
    whole = sent.trained["w"].product() + sent.tail["w"].product()
    assert error(whole, adapter.matrices["w"].product()) < 1e-6


def test_a_policy_of_fresh_directions_and_a_whole_tail_is_joined_exactly() -> None:
    """Only `choose_directions` decides what is trained; the join takes any choice."""
    rule = Delta(rank_cap=60, fresh_rank=60)
    adapter = warm_state(rule)
    contributions = [
        train(f"d{i}", send(rule, adapter, plan(f"d{i}", 4, tail=60)), seed=30 + i)
        for i in range(2)
    ]
    joined = rule.join(adapter, contributions)
    assert error(joined.matrices["w"].product(), reference(adapter, contributions)) < 1e-6


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_a_device_that_holds_all_directions_holds_the_whole_update(scale: float) -> None:
    adapter = warm_state(Delta(rank_cap=60))
    sent = Delta(rank_cap=60).dispatch(
        adapter, plan("d", 16), scale=scale, rng=np.random.default_rng(0)
    )
    assert error(sent.trained["w"].product(), adapter.matrices["w"].product()) < 1e-6


def test_scales_by_rank_fold_and_join_exactly() -> None:
    rule = Delta(rank_cap=60)
    adapter, scale = warm_state(rule), LoraScale(2.0, "rank-stabilised")
    sent = [
        rule.dispatch(adapter, plan(f"d{r}", r), scale=scale, rng=np.random.default_rng(0))
        for r in (4, 9)
    ]
    assert [s.trained["w"].scale for s in sent] == [1.0, 2.0 / 3.0]
    assert [truncation_rank(adapter.matrices["w"], s.trained["w"]) for s in sent] == [4, 9]
    contributions = [train(f"d{i}", s, seed=i, weight=i + 1.0) for i, s in enumerate(sent)]
    joined = rule.join(adapter, contributions)
    assert error(joined.matrices["w"].product(), reference(adapter, contributions)) < 1e-6


def assert_equal_bits(left: GlobalAdapter, right: GlobalAdapter) -> None:
    assert left.matrices.keys() == right.matrices.keys()
    for name, low_rank in left.matrices.items():
        for field in ("u", "sigma", "v"):
            assert np.array_equal(getattr(low_rank, field), getattr(right.matrices[name], field))


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_a_factor_of_a_half_adds_half_of_the_difference(wire: str) -> None:
    rule = Delta(rank_cap=60)
    adapter = warm_state(rule)
    contributions = []
    for index, (rank, factor) in enumerate(((2, 0.5), (8, 1.0), (30, 0.0))):
        sent = send(rule, adapter, plan(f"d{index}", rank))
        sent = rounded(sent) if wire == "float16" else sent
        each = train(f"d{index}", sent, seed=10 + index, weight=1.0 + index)
        contributions.append(replace(each, factor=factor))
    joined = rule.join(adapter, contributions)
    expected = adapter.matrices["w"].product()
    for c, share in zip(contributions, (1 / 6, 2 / 6, 3 / 6), strict=True):
        change = c.update.factors["w"].product() - c.sent.trained["w"].product()
        expected = expected + share * c.factor * change
    assert error(joined.matrices["w"].product(), expected) < 1e-6


def test_an_update_of_an_older_round_joins_exactly() -> None:
    """What the device was sent is no part of the state any more; its difference still is."""
    rule = Delta(rank_cap=60)
    old = warm_state(rule)
    late = replace(train("late", send(rule, old, plan("late", 8)), seed=40), factor=0.25)
    early = [train(f"d{i}", send(rule, old, plan(f"d{i}", 4 + i)), seed=41 + i) for i in range(2)]
    state = rule.join(old, early)
    now = [train(f"d{i}", send(rule, state, plan(f"d{i}", 6)), seed=50 + i) for i in range(2)]
    assert truncation_rank(state.matrices["w"], late.sent.trained["w"]) is None
    joined = rule.join(state, [*now, late])
    expected = state.matrices["w"].product()
    for c in (*now, late):
        change = c.update.factors["w"].product() - c.sent.trained["w"].product()
        expected = expected + c.factor / 3 * change
    assert error(joined.matrices["w"].product(), expected) < 1e-6


@pytest.mark.parametrize("devices", [6, 40])
def test_workers_and_order_of_arrival_change_no_bit(devices: int) -> None:
    """Of 40 devices the products are multiplied out as they are read, of 6 they are stacked."""
    shapes = [MatrixShape(f"w{i}", 80, 60 + i, 0) for i in range(5)]
    matrices = tuple(MatrixPlan(s.name, 6, "fp32") for s in shapes)
    found = []
    for workers in (1, 2, 5):
        rule = Delta(rank_cap=20, workers=workers)
        adapter = rule.start(shapes, {})
        for round_index in range(2):
            contributions = []
            for index in range(devices):
                device = DevicePlan(f"d{index:02d}", matrices, 1, 1, 8, 1)
                sent = send(rule, adapter, device)
                contributions.append(train(device.device, sent, seed=100 * round_index + index))
            order = np.random.default_rng(workers).permutation(devices)
            adapter = rule.join(adapter, [contributions[i] for i in order])
        found.append(adapter)
    for other in found[1:]:
        assert_equal_bits(other, found[0])


def test_many_devices_add_exactly_their_differences() -> None:
    rule = Delta(rank_cap=60)
    adapter = warm_state(rule)
    contributions = [
        train(f"d{i:02d}", send(rule, adapter, plan(f"d{i:02d}", 4)), seed=i) for i in range(40)
    ]
    joined = rule.join(adapter, contributions)
    assert error(joined.matrices["w"].product(), reference(adapter, contributions)) < 1e-6


def test_factors_are_read_once_and_when_their_matrix_is_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = [MatrixShape(f"w{i}", 30, 20, 0) for i in range(3)]
    rule = Delta(rank_cap=8, workers=1)
    adapter = rule.start(shapes, {})
    matrices = tuple(MatrixPlan(s.name, 4, "fp32") for s in shapes)
    read = []
    contributions = []
    for device in ("a", "b"):
        each = train(device, send(rule, adapter, DevicePlan(device, matrices, 1, 1, 8, 1)), seed=1)

        def asked(
            name: str, device: str = device, known: Mapping[str, LoraFactors] = each.update.factors
        ) -> LoraFactors:
            read.append((name, device))
            return known[name]

        factors = ReadOnAsking(list(each.update.factors), asked)
        contributions.append(replace(each, update=replace(each.update, factors=factors)))

    def joining(items: Iterable[str], work: Callable[[str], object], workers: int) -> list[object]:
        read.clear()  # the tests' checks of types read some values of a mapping
        return for_each(items, work, workers)

    monkeypatch.setattr("fedtune.aggregate.contributions.for_each", joining)
    rule.join(adapter, contributions)
    assert read == [(f"w{i}", device) for i in range(3) for device in ("a", "b")]
