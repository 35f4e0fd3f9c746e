"""Identities that the rules hold, and which rule does not hold which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedtune.aggregate.rules import RULES, Rule, make_rule
from fedtune.errors import ConfigError, PlanError, RefusedUpdateError, RoundError
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    GlobalAdapter,
    LoraFactors,
    MatrixPlan,
    MatrixShape,
)

SHAPES = (
    MatrixShape("layers.0.q_proj", 48, 32, 0),
    MatrixShape("layers.0.down_proj", 24, 64, 0),
)
NAMES = tuple(shape.name for shape in SHAPES)
SCALE = 0.5
CAP = 24
PRODUCT_RULES = ("delta", "flexlora", "flora")


@dataclass(frozen=True)
class Fleet:
    """A rule, its state, and how to run rounds on it with random training."""

    rule: Rule
    adapter: GlobalAdapter

    def send(self, ranks: Mapping[str, int], tail: int = 0, seed: int = 7) -> dict[str, Dispatch]:
        return {
            device: self.rule.dispatch(
                self.adapter,
                device_plan(device, rank, tail),
                scale=SCALE,
                rng=np.random.default_rng(seed),
            )
            for device, rank in ranks.items()
        }

    def round(
        self, ranks: Mapping[str, int], tail: int = 0, seed: int = 7, size: float = 0.1
    ) -> tuple[Fleet, list[Contribution]]:
        sent = self.send(ranks, tail, seed)
        contributions = [
            contribution(device, sent[device], weight=1.0 + index, seed=seed + index, size=size)
            for index, device in enumerate(ranks)
        ]
        return replace(self, adapter=self.rule.join(self.adapter, contributions)), contributions


def device_plan(device: str, rank: int, tail: int = 0) -> DevicePlan:
    return DevicePlan(
        device=device,
        matrices=tuple(MatrixPlan(name, rank, "fp32", tail_rank=tail) for name in NAMES),
        micro_batch=1,
        batch_size=1,
        sequence_length=8,
        local_steps=1,
    )


def trained(sent: Dispatch, seed: int, size: float) -> dict[str, LoraFactors]:
    """What training could make of the sent factors: a random step on both sides."""
    rng = np.random.default_rng(seed)

    def moved(array: np.ndarray) -> np.ndarray:
        return (array + size * rng.standard_normal(array.shape)).astype(np.float32)

    return {
        name: LoraFactors(a=moved(factors.a), b=moved(factors.b), scale=factors.scale)
        for name, factors in sent.trained.items()
    }


def contribution(
    device: str, sent: Dispatch, weight: float, seed: int, size: float = 0.1
) -> Contribution:
    rng = np.random.default_rng(seed + 1000)
    dense = {
        name: (value + rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in sent.dense.items()
    }
    return returned(device, sent, trained(sent, seed, size), dense, weight)


def returned(
    device: str,
    sent: Dispatch,
    factors: Mapping[str, LoraFactors],
    dense: Mapping[str, np.ndarray],
    weight: float = 1.0,
) -> Contribution:
    update = AdapterUpdate(
        run="run",
        round=1,
        device=device,
        base_digest="0",
        factors=factors,
        dense=dense,
        samples=1,
        tokens=1,
    )
    return Contribution(weight=weight, sent=sent, update=update)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def held(contribution: Contribution, name: str) -> np.ndarray:
    """The dense update that the device computes with: its trained pair and its tail."""
    product = contribution.update.factors[name].product()
    tail = contribution.sent.tail.get(name)
    return product if tail is None else product + tail.product()


def assert_equal_bits(left: GlobalAdapter, right: GlobalAdapter) -> None:
    assert left.matrices.keys() == right.matrices.keys()
    for name, low_rank in left.matrices.items():
        other = right.matrices[name]
        for field in ("u", "sigma", "v"):
            assert np.array_equal(getattr(low_rank, field), getattr(other, field))
    for name, value in left.dense.items():
        assert np.array_equal(value, right.dense[name])
    assert left.dropped_energy == right.dropped_energy


def start(rule_name: str, cap: int = CAP, fresh_rank: int = 0) -> Fleet:
    rule = make_rule(rule_name, cap, seed=3, fresh_rank=fresh_rank)
    head = {"score.weight": np.ones((2, 5), np.float32)}
    return Fleet(rule, rule.start(SHAPES, head))


@pytest.fixture(params=list(RULES))
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """A fleet of three unequal devices after one round."""
    after, _ = start(request.param).round({"a": 8, "b": 4, "c": 2})
    return after


class TestEveryRule:
    def test_the_first_state_changes_nothing(self, fleet: Fleet) -> None:
        adapter = fleet.rule.start(SHAPES, {})
        assert adapter.round == 0
        assert all(not low_rank.product().any() for low_rank in adapter.matrices.values())

    def test_one_device_that_holds_everything_is_the_identity(self, fleet: Fleet) -> None:
        # Under flora the device trains on top of the frozen rest; what it holds is the sum.
        # Under the others it trains all directions of the state.
        ranks = {"only": CAP}
        after, contributions = fleet.round(ranks, seed=11)
        for name in NAMES:
            product = after.adapter.matrices[name].product()
            assert error(product, held(contributions[0], name)) < 1e-6

    def test_a_device_with_room_for_it_starts_from_the_whole_update(self, fleet: Fleet) -> None:
        sent = fleet.send({"a": CAP}, tail=CAP)["a"]
        for name in NAMES:
            product = sent.trained[name].product()
            product = product + (sent.tail[name].product() if name in sent.tail else 0.0)
            assert error(product, fleet.adapter.matrices[name].product()) < 1e-6

    def test_an_untrained_round_changes_no_product(self, fleet: Fleet) -> None:
        # flexlora fails: a device of rank 2 votes zero on the directions it was not sent.
        # zero-pad keeps it only because all three devices hold equal leading rows: the device of
        # rank 2 pads with zeros, and so fails too.
        sent = fleet.send({"a": 8, "b": 4, "c": 2})
        back = [returned(d, s, s.trained, s.dense) for d, s in sent.items()]
        after = fleet.rule.join(fleet.adapter, back)
        for name in NAMES:
            moved = error(after.matrices[name].product(), fleet.adapter.matrices[name].product())
            if fleet.rule.name in ("delta", "flora"):
                assert moved < 1e-6
            else:
                assert moved > 0.05

    def test_equal_ranks_agree_with_the_dense_mean_of_products(self, fleet: Fleet) -> None:
        # zero-pad fails by construction: it multiplies means instead of averaging products.
        ranks = {"a": 6, "b": 6, "c": 6}
        fresh = start(fleet.rule.name)
        after, contributions = fresh.round(ranks, size=0.3)
        weights = np.array([c.weight for c in contributions]) / sum(c.weight for c in contributions)
        for name in NAMES:
            mean = sum(w * held(c, name) for w, c in zip(weights, contributions, strict=True))
            wrong = error(after.adapter.matrices[name].product(), mean)
            if fleet.rule.name == "zero-pad":
                assert wrong > 0.01
            else:
                assert wrong < 1e-6

    def test_permuting_devices_changes_no_bit(self, fleet: Fleet) -> None:
        ranks = {"c": 2, "a": 8, "b": 4}
        _, contributions = fleet.round(ranks, seed=13)
        expected = fleet.rule.join(fleet.adapter, contributions)
        for order in ((2, 0, 1), (1, 0, 2), (2, 1, 0)):
            permuted = [contributions[i] for i in order]
            assert_equal_bits(fleet.rule.join(fleet.adapter, permuted), expected)

    def test_a_change_of_factors_with_equal_product_changes_nothing(self, fleet: Fleet) -> None:
        # zero-pad fails: the mean of B depends on which of the equal factor pairs came back.
        _, contributions = fleet.round({"a": 8, "b": 4}, seed=17)
        plain = fleet.rule.join(fleet.adapter, contributions)
        mixed = fleet.rule.join(fleet.adapter, [mix_factors(c) for c in contributions])
        for name in NAMES:
            moved = error(mixed.matrices[name].product(), plain.matrices[name].product())
            if fleet.rule.name == "zero-pad":
                assert moved > 0.01
            else:
                assert moved < 1e-5  # the mixed factors were rounded to float32

    def test_dispatch_is_the_same_bits_every_time(self, fleet: Fleet) -> None:
        first, second = (fleet.send({"a": 8}, tail=3)["a"] for _ in range(2))
        for name, factors in first.trained.items():
            assert factors.a.dtype == factors.b.dtype == np.float32
            assert np.array_equal(factors.a, second.trained[name].a)
            assert np.array_equal(factors.b, second.trained[name].b)

    def test_a_device_of_lower_rank_gets_the_leading_part(self, fleet: Fleet) -> None:
        sent = fleet.send({"high": 20, "low": 16})
        for name in NAMES:
            high, low = sent["high"].trained[name], sent["low"].trained[name]
            assert np.array_equal(high.a[:16], low.a)
            assert np.array_equal(high.b[:, :16], low.b)

    def test_join_changes_none_of_its_inputs(self, fleet: Fleet) -> None:
        _, contributions = fleet.round({"a": 8, "b": 4}, seed=19)
        adapter, copies = copy.deepcopy(fleet.adapter), copy.deepcopy(contributions)
        fleet.rule.join(fleet.adapter, contributions)
        assert_equal_bits(fleet.adapter, adapter)
        for before, after in zip(copies, contributions, strict=True):
            for name in NAMES:
                assert np.array_equal(before.update.factors[name].a, after.update.factors[name].a)
                assert np.array_equal(before.sent.trained[name].b, after.sent.trained[name].b)

    def test_weights_count_by_their_ratio_only(self, fleet: Fleet) -> None:
        _, contributions = fleet.round({"a": 8, "b": 4}, seed=23)
        scaled = [replace(c, weight=1024 * c.weight) for c in contributions]
        assert_equal_bits(
            fleet.rule.join(fleet.adapter, scaled), fleet.rule.join(fleet.adapter, contributions)
        )

    def test_dense_tensors_are_a_mean_of_differences(self, fleet: Fleet) -> None:
        after, contributions = fleet.round({"a": 8, "b": 4}, seed=29)
        before = fleet.adapter.dense["score.weight"].astype(np.float64)
        changes = [c.update.dense["score.weight"] - before for c in contributions]
        expected = before + changes[0] / 3 + changes[1] * 2 / 3
        assert after.adapter.dense["score.weight"].dtype == np.float32
        assert error(after.adapter.dense["score.weight"], expected) < 1e-6

    def test_the_round_counts_up(self, fleet: Fleet) -> None:
        assert fleet.adapter.round == 1

    def test_the_state_is_float32_and_within_its_cap(self, fleet: Fleet) -> None:
        state = fleet
        for seed in range(31, 35):
            state, _ = state.round({"a": 8, "b": 8, "c": 8}, seed=seed)
        for name, shape in zip(NAMES, SHAPES, strict=True):
            low_rank = state.adapter.matrices[name]
            assert low_rank.u.dtype == low_rank.sigma.dtype == low_rank.v.dtype == np.float32
            assert np.all(np.diff(low_rank.sigma) <= 0)
            smaller = min(shape.out_features, shape.in_features)
            assert low_rank.rank <= (smaller if fleet.rule.name == "flora" else CAP)

    def test_no_contribution_is_an_error(self, fleet: Fleet) -> None:
        with pytest.raises(RoundError, match="no device reported"):
            fleet.rule.join(fleet.adapter, [])

    def test_a_missing_matrix_is_refused_by_name(self, fleet: Fleet) -> None:
        with pytest.raises(RefusedUpdateError, match=r"of a lacks the matrix layers\.0\.q_proj"):
            fleet.rule.join(fleet.adapter, changed(fleet, drop=NAMES[0]))

    def test_an_extra_matrix_is_refused_by_name(self, fleet: Fleet) -> None:
        with pytest.raises(RefusedUpdateError, match="of a holds the matrix other, which it was"):
            fleet.rule.join(fleet.adapter, changed(fleet, add="other"))

    def test_a_matrix_unknown_to_the_state_is_refused(self, fleet: Fleet) -> None:
        adapter = replace(fleet.adapter, matrices={NAMES[0]: fleet.adapter.matrices[NAMES[0]]})
        with pytest.raises(RefusedUpdateError, match="down_proj, which the global adapter does"):
            fleet.rule.join(adapter, changed(fleet))

    def test_a_missing_dense_tensor_is_refused_by_name(self, fleet: Fleet) -> None:
        sent = fleet.send({"a": 2})["a"]
        with pytest.raises(RefusedUpdateError, match=r"lacks the dense tensor score\.weight"):
            fleet.rule.join(fleet.adapter, [returned("a", sent, sent.trained, {})])

    def test_a_wrong_shape_is_refused(self, fleet: Fleet) -> None:
        sent = fleet.send({"a": 4})["a"]
        wrong = {n: LoraFactors(f.a[:2], f.b[:, :2], f.scale) for n, f in sent.trained.items()}
        with pytest.raises(RefusedUpdateError, match=r"\.a of a must have the shape \(4, "):
            fleet.rule.join(fleet.adapter, [returned("a", sent, wrong, sent.dense)])

    def test_values_that_are_not_finite_are_refused(self, fleet: Fleet) -> None:
        sent = fleet.send({"a": 4})["a"]
        wrong = {
            n: LoraFactors(f.a, np.full_like(f.b, np.nan), f.scale) for n, f in sent.trained.items()
        }
        with pytest.raises(RefusedUpdateError, match="not finite"):
            fleet.rule.join(fleet.adapter, [returned("a", sent, wrong, sent.dense)])

    def test_dense_values_that_are_not_as_sent_are_refused(self, fleet: Fleet) -> None:
        sent = fleet.send({"a": 4})["a"]
        for value, words in (
            (np.full((2, 5), np.inf, np.float32), "score.weight of a holds values that are not"),
            (np.ones((5, 2), np.float32), "score.weight of a must have the shape"),
        ):
            wrong = returned("a", sent, sent.trained, {"score.weight": value})
            with pytest.raises(RefusedUpdateError, match=words):
                fleet.rule.join(fleet.adapter, [wrong])

    def test_a_device_that_reports_twice_is_refused(self, fleet: Fleet) -> None:
        with pytest.raises(RefusedUpdateError, match="a reported twice"):
            fleet.rule.join(fleet.adapter, changed(fleet) * 2)

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_weight_that_is_not_positive_is_refused(self, fleet: Fleet, weight: float) -> None:
        bad = [replace(c, weight=weight) for c in changed(fleet)]
        with pytest.raises(RefusedUpdateError, match="weight of a must be positive"):
            fleet.rule.join(fleet.adapter, bad)

    def test_a_factor_is_for_differences_only(self, fleet: Fleet) -> None:
        late = [replace(c, factor=0.5) for c in changed(fleet)]
        if fleet.rule.name in ("delta", "flora"):
            whole = fleet.rule.join(fleet.adapter, changed(fleet))
            half = fleet.rule.join(fleet.adapter, late)
            for name in NAMES:
                before = fleet.adapter.matrices[name].product()
                change = whole.matrices[name].product() - before
                moved = half.matrices[name].product() - before
                assert np.abs(moved - change / 2).max() < 1e-6
        else:
            words = f"the rule {fleet.rule.name} joins whole factors, so the difference of a"
            with pytest.raises(RoundError, match=words):
                fleet.rule.join(fleet.adapter, late)

    def test_half_of_a_dense_tensors_difference(self, fleet: Fleet) -> None:
        if fleet.rule.name not in ("delta", "flora"):
            pytest.skip("joins no differences of matrices")
        _, contributions = fleet.round({"a": 8, "b": 4}, seed=29)
        late = [replace(contributions[0], factor=0.5), contributions[1]]
        before = fleet.adapter.dense["score.weight"].astype(np.float64)
        changes = [c.update.dense["score.weight"] - before for c in contributions]
        expected = before + 0.5 * changes[0] / 3 + changes[1] * 2 / 3
        joined = fleet.rule.join(fleet.adapter, late)
        assert error(joined.dense["score.weight"], expected) < 1e-6

    def test_any_number_of_workers_gives_the_same_bits(self, fleet: Fleet) -> None:
        _, contributions = fleet.round({"a": 8, "b": 4, "c": 3}, seed=43)
        one, three = (
            make_rule(fleet.rule.name, CAP, seed=3, workers=workers).join(
                fleet.adapter, contributions
            )
            for workers in (1, 3)
        )
        assert_equal_bits(one, three)

    def test_a_plan_for_an_unknown_matrix_is_an_error(self, fleet: Fleet) -> None:
        plan = replace(device_plan("a", 2), matrices=(MatrixPlan("other", 2, "fp32"),))
        with pytest.raises(PlanError, match="plan of a names matrix other"):
            fleet.rule.dispatch(fleet.adapter, plan, scale=1.0, rng=np.random.default_rng(0))

    def test_a_matrix_that_nobody_trains_stays(self, fleet: Fleet) -> None:
        contributions = train_only(fleet, {"a": (NAMES[0],), "b": (NAMES[0],)})
        after = fleet.rule.join(fleet.adapter, contributions)
        before = fleet.adapter.matrices[NAMES[1]]
        assert after.matrices[NAMES[1]] is before
        assert after.dropped_energy[NAMES[1]] == 0.0

    def test_who_shares_the_weight_of_a_device_that_does_not_train(self, fleet: Fleet) -> None:
        # Rules of differences: over all that reported; an absent device votes for no change.
        # flexlora and zero-pad average values, so an absent device would pull them to zero:
        # there the weights are normalised over the devices that trained the matrix.
        contributions = train_only(fleet, {"a": NAMES, "b": (NAMES[0],)})
        after = fleet.rule.join(fleet.adapter, contributions)
        before = fleet.adapter.matrices[NAMES[1]].product()
        sent, got = (
            contributions[0].sent.trained[NAMES[1]],
            contributions[0].update.factors[NAMES[1]],
        )
        if fleet.rule.name in ("delta", "flora"):
            expected = before + 0.5 * (got.product() - sent.product())
        else:
            expected = got.product()
        assert error(after.matrices[NAMES[1]].product(), expected) < 1e-6


def mix_factors(contribution: Contribution) -> Contribution:
    """(B, A) -> (B M, M^-1 A) for a well-conditioned random M."""
    rng = np.random.default_rng(41)
    factors = {}
    for name, pair in contribution.update.factors.items():
        mix = np.eye(pair.rank) + 0.2 * rng.standard_normal((pair.rank, pair.rank))
        factors[name] = LoraFactors(
            a=(np.linalg.inv(mix) @ pair.a).astype(np.float32),
            b=(pair.b @ mix).astype(np.float32),
            scale=pair.scale,
        )
    return replace(contribution, update=replace(contribution.update, factors=factors))


def changed(fleet: Fleet, drop: str = "", add: str = "") -> list[Contribution]:
    """One contribution with a matrix missing or one too many."""
    sent = fleet.send({"a": 2})["a"]
    factors = {n: f for n, f in sent.trained.items() if n != drop}
    if add:
        factors[add] = sent.trained[NAMES[0]]
    return [returned("a", sent, factors, sent.dense)]


def train_only(fleet: Fleet, names: Mapping[str, Sequence[str]]) -> list[Contribution]:
    """Contributions of devices whose rank is 0 in the matrices that are not named, weight 1."""
    contributions = []
    for index, (device, wanted) in enumerate(names.items()):
        plan = device_plan(device, CAP)
        plan = replace(
            plan,
            matrices=tuple(m if m.name in wanted else replace(m, rank=0) for m in plan.matrices),
        )
        sent = fleet.rule.dispatch(fleet.adapter, plan, scale=SCALE, rng=np.random.default_rng(5))
        assert set(sent.trained) == set(wanted)
        contributions.append(contribution(device, sent, weight=1.0, seed=50 + index))
    return contributions


def test_rules_are_built_by_name() -> None:
    for name in RULES:
        assert make_rule(name, 4).name == name


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make_rule("mean", 4), "aggregate.rule must be one of delta, zero-pad, flexlora"),
        (lambda: make_rule("delta", 0), "lora.rank_cap must be at least 1, got 0"),
        (lambda: make_rule("delta", 4, fresh_rank=-1), "fresh_rank must not be negative"),
        (lambda: make_rule("delta", 4, workers=0), "workers must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], Rule], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()
