"""One round: what is sent, what is refused, how much each device counts, and when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtune.aggregate.rules import Rule, make_rule
from fedtune.coding import CODECS
from fedtune.errors import ProtocolError, RoundError
from fedtune.records import Contribution, DevicePlan, GlobalAdapter, LoraScale, MatrixPlan
from fedtune.wire.flower import EVALUATE, TRAIN
from fedtune.wire.messages import OptimizerSpec, encode_train_instruction
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune.wire.tensors import unpack_dispatch
from fedtune_server.evaluation import evaluate
from fedtune_server.round import Outcome, train
from fedtune_server.starts import prepare
from fedtune_server.terms import RoundTerms

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
UP, DOWN = "layers.0.up", "layers.0.down"


class Table:
    """A fleet, a rule and its state before the first round."""

    def __init__(self, fake: Any, **terms: Any) -> None:
        self.fake = fake
        self.rule: Rule = make_rule("delta", 8)
        self.start: GlobalAdapter = self.rule.start(fake.shapes.matrices, {})
        fields: dict[str, Any] = {
            "scale": LoraScale(2.0),
            "down": "fp32",
            "up": "fp32",
            "weights": "uniform",
            "minimum_devices": 1,
            "deadline_s": 30.0,
            "seed": 0,
        }
        shapes = fake.shapes
        self.terms = RoundTerms(
            run="run-1",
            base_digest=shapes.digest,
            shapes=shapes.by_name(),
            **{**fields, **terms},
        )

    def plan(self, device: str, rank: int = 2) -> DevicePlan:
        matrices = (MatrixPlan(UP, rank, "fp32"), MatrixPlan(DOWN, 0, "fp32", tail_rank=4))
        return DevicePlan(device, matrices, 2, 4, 16, 3)

    def plans(self) -> list[DevicePlan]:
        return [self.plan(name) for name in sorted(self.fake.names)]

    def train(
        self, lost: str = "", round: int = 1, evaluate: bool = True
    ) -> tuple[GlobalAdapter, float | None]:
        outcome = self.play(lost, round, evaluate)
        return outcome.joined, outcome.held_out_loss

    def play(self, lost: str = "", round: int = 1, evaluate: bool = True) -> Outcome:
        fault = self.fake.lose(lost, TRAIN) if lost else None
        with self.fake.grid(fault) as grid:
            fleet = self.fake.gather(grid)
            return train(
                grid, fleet, self.rule, self.start, self.plans(), OptimizerSpec(), self.terms,
                round, self.fake.open_rounds, evaluate=evaluate, emit=self.fake.events.append,
            )  # fmt: skip

    def evaluate(self, lost: str = "") -> float | None:
        fault = self.fake.lose(lost, EVALUATE) if lost else None
        with self.fake.grid(fault) as grid:
            fleet = self.fake.gather(grid)
            return evaluate(
                grid, fleet, self.rule, self.start, self.plans(), self.terms,
                self.fake.events.append,
            )  # fmt: skip

    def step(self, device: str) -> np.ndarray:
        """What one device of the fake fleet adds to the product of `up`."""
        (sent,) = prepare(self.rule, self.start, [self.plan(device)], self.terms, 1).values()
        pair = sent.dispatch.trained[UP]
        added = 0.01 * (self.fake.names.index(device) + 1)
        changed = replace(pair, b=pair.b + np.float32(added))
        return np.asarray(changed.product() - pair.product())


def product(adapter: GlobalAdapter) -> np.ndarray:
    return np.asarray(adapter.matrices[UP].product())


# ---------------------------------------------------------------- sending


def test_every_device_is_sent_its_plan_its_tensors_and_the_runs_terms(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b"))
    table.train(round=4)
    sent = prepare(table.rule, table.start, table.plans(), table.terms, 4)
    assert [order.plan for order in table.fake.orders] == table.plans()
    for order in table.fake.orders:
        assert (order.run, order.round, order.scale.value, order.seed) == ("run-1", 4, 2.0, 0)
        assert order.base_digest == table.fake.shapes.digest
        assert order.tensors_digest == tensors_digest(sent[order.plan.device].packed)
        assert order.evaluate


def test_fresh_directions_nest_over_ranks_and_change_over_rounds(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b"))
    plans = [table.plan("a", rank=2), table.plan("b", rank=5)]
    sent = prepare(table.rule, table.start, plans, table.terms, 1)
    small, large = (sent[name].dispatch.trained[UP] for name in "ab")
    np.testing.assert_allclose(large.a[:2], small.a, rtol=1e-6)
    later = prepare(table.rule, table.start, plans, table.terms, 2)["a"].dispatch.trained[UP]
    assert not np.allclose(later.a, small.a)


@pytest.mark.parametrize("codec", CODECS)
def test_the_coordinator_keeps_what_the_device_will_read(fleet_of: FleetOf, codec: str) -> None:
    table = Table(fleet_of("a"), down=codec)
    sent = prepare(table.rule, table.start, table.plans(), table.terms, 1)["a"]
    read = unpack_dispatch(sent.packed, table.plan("a"), table.terms.shapes, {}, LoraScale(2.0))
    kept, found = sent.dispatch.trained[UP], read.trained[UP]
    np.testing.assert_array_equal(kept.a, found.a)
    np.testing.assert_array_equal(kept.b, found.b)
    assert kept.scale == found.scale


@pytest.mark.parametrize(("down", "up"), [("q3", "fp32"), ("fp32", "q2"), ("int8", "q4")])
def test_rounds_in_few_bits_join_to_the_dense_formula(
    fleet_of: FleetOf, down: str, up: str
) -> None:
    """G + sum of p (s B A - P), with B A as it arrived and P as the device read it."""
    table = Table(fleet_of("a", "b"), down=down, up=up)
    table.start, _ = table.train()
    seen: list[Contribution] = []
    rule = table.rule
    before = product(table.start)

    class Watched:
        tail, name = rule.tail, rule.name
        dispatch, start = rule.dispatch, rule.start

        def join(self, adapter: GlobalAdapter, good: Sequence[Contribution]) -> GlobalAdapter:
            seen.extend(good)
            return rule.join(adapter, good)

    table.rule = Watched()  # type: ignore[assignment]
    joined, _ = table.train(round=2)
    change = sum(
        0.5 * pair.scale * (pair.b.astype(float) @ pair.a - sent.b.astype(float) @ sent.a)
        for pair, sent in ((c.update.factors[UP], c.sent.trained[UP]) for c in seen)
    )
    assert np.linalg.norm(change) > 1e-3
    np.testing.assert_allclose(product(joined), before + change, atol=1e-6)
    if up == "fp32":  # then A comes back as it was read, and devices add 0.01 and 0.02 to B
        added = zip((0.01, 0.02), seen, strict=True)
        ones = np.ones((12, 2))
        moved = sum(size * ones @ c.update.factors[UP].a.astype(float) for size, c in added)
        np.testing.assert_allclose(change, moved, atol=1e-6)


def test_an_update_in_another_codec_than_asked_is_refused(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b"), up="q4")
    table.fake.spoil["b"] = _with(_packed(1.0))
    table.train()
    (refused,) = table.fake.all("device_refused")
    assert "expected codec q4, got fp32" in str(refused["reason"])


def test_flower_adds_about_two_hundred_bytes_to_a_message(fleet_of: FleetOf) -> None:
    """What docs/traffic.md says of it: the size on the wire less our body and packed tensors."""
    table = Table(fleet_of("a"))
    with table.fake.grid() as grid:
        fleet = table.fake.gather(grid)
        asked, answered = grid.bytes_down, grid.bytes_up
        train(
            grid, fleet, table.rule, table.start, table.plans(), OptimizerSpec(), table.terms,
            1, table.fake.open_rounds, evaluate=True, emit=table.fake.events.append,
        )  # fmt: skip
        down, up = grid.bytes_down - asked, grid.bytes_up - answered
    (order,) = table.fake.orders
    (reported,) = table.fake.all("device_reported")
    body = len(encode_train_instruction(order))
    assert 150 < down - body - reported["download_bytes"] < 250
    assert up - reported["upload_bytes"] < 700


# ---------------------------------------------------------------- joining


@pytest.mark.parametrize(
    ("weights", "shares"),
    [("uniform", (1 / 2, 1 / 2)), ("samples", (1 / 4, 3 / 4)), ("tokens", (1 / 3, 2 / 3))],
)
def test_devices_count_by_what_the_run_says(
    fleet_of: FleetOf, weights: str, shares: tuple[float, float]
) -> None:
    fake = fleet_of("a", "b")
    fake.change("b", train_samples=30)  # a has 10; their rounds train on 7 and 14 tokens
    table = Table(fake, weights=weights)
    joined, _ = table.train()
    expected = shares[0] * table.step("a") + shares[1] * table.step("b")
    np.testing.assert_allclose(product(joined), expected, atol=1e-6)
    assert np.linalg.norm(expected) > 1e-3


def test_the_held_out_loss_is_the_mean_over_all_held_out_units(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b"))  # losses 1 and 2 over 10 and 20 units
    _, before = table.train()
    assert before == pytest.approx(50 / 30)
    (finished,) = table.fake.all("round_finished")
    assert finished["held_out_loss"] == before
    assert finished["train_loss"] == 2.0
    assert (finished["reported"], finished["refused"]) == (2, 0)
    reported = table.fake.all("device_reported")
    assert [(f["device"], f["loss_before"], f["tokens"]) for f in reported] == [
        ("a", 1.0, 7),
        ("b", 2.0, 14),
    ]


def test_a_round_that_measures_nothing_has_no_held_out_loss(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a"))
    _, before = table.train(evaluate=False)
    assert before is None
    assert table.fake.all("round_finished")[0]["held_out_loss"] is None
    assert table.fake.all("device_reported")[0]["loss_before"] is None


def test_a_lost_device_fails_at_the_deadline_and_the_round_goes_on(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b", "c"), deadline_s=0.4)
    joined, _ = table.train(lost="b")
    np.testing.assert_allclose(product(joined), (table.step("a") + table.step("c")) / 2, atol=1e-6)
    (refused,) = table.fake.all("device_refused")
    assert (refused["device"], refused["round"]) == ("b", 1)
    assert "within 0.4 s" in str(refused["reason"])
    (finished,) = table.fake.all("round_finished")
    assert (finished["reported"], finished["refused"]) == (2, 1)


def test_a_round_tells_what_was_measured_and_who_answered_with_an_error(
    fleet_of: FleetOf,
) -> None:
    table = Table(fleet_of("a", "b", "c", "d"), deadline_s=0.4)
    table.fake.spoil["b"] = _said(round=2)  # a bad update is no error of the device

    def refuse(said: Any, tensors: bytes) -> Any:
        raise ProtocolError("d: the plan needs 2 bytes and this site allows 1")

    table.fake.spoil["d"] = refuse
    outcome = table.play(lost="c")
    assert outcome.failed == ("d",)
    assert outcome.metrics.keys() == {"a"}
    assert outcome.metrics["a"]["held_out_loss"] == 1.0


def test_a_planned_round_takes_as_long_as_its_slowest_device(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b"))
    seconds = iter((3.0, 7.0))
    plans = [replace(plan, seconds=next(seconds)) for plan in table.plans()]
    table.plans = lambda: plans  # type: ignore[method-assign]
    table.train()
    assert table.fake.all("round_finished")[0]["planned_seconds"] == 7.0


def test_too_few_updates_fail_the_round(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b", "c"), minimum_devices=3, deadline_s=0.2)
    words = (
        "round 1 needs updates of 3 devices, got 2 good and 3 refused; see the reasons above, then "
        "start the same command again to go on from round 0"
    )
    with pytest.raises(RoundError, match=words):
        table.train(lost="c")
    assert table.fake.all("round_finished") == []


# ---------------------------------------------------------------- refusing


def _packed(value: float) -> bytes:
    """Tensors of the planned shapes, all of one value; packed by hand, as nan cannot be."""
    good = pack_tensors(
        {f"{UP}.a": np.ones((2, 8), np.float32), f"{UP}.b": np.ones((12, 2), np.float32)}
    )
    one, other = np.float32(1).tobytes(), np.float32(value).tobytes()
    return good.replace(one, other)


def _with(tensors: bytes) -> Callable[[Any, bytes], Any]:
    return lambda said, _: (replace(said, tensors_digest=tensors_digest(tensors)), tensors)


def _said(**fields: Any) -> Callable[[Any, bytes], Any]:
    return lambda said, tensors: (replace(said, **fields), tensors)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_said(device="a"), "update of b: expected device b, got 'a'"),
        (_said(round=2), "update of b: expected round 1, got '2'"),
        (_said(run="run-0"), "update of b: expected run run-1, got 'run-0'"),
        (_said(samples=10**6), "update of b: expected 1..12 samples for its plan, got 1000000"),
        (_said(metrics={"train_loss": float("nan")}), "train_loss"),
        (_said(tensors_digest="0" * 64), "do not have the reported sha256"),
        (lambda said, tensors: (said, b""), "the report came without tensors"),
        (_with(_packed(float("nan"))), "expected finite values, got nan or inf"),
        (_with(_packed(1e6)), "expected a norm of at most 10000 for layers.0.up"),
        (_with(b"x" * 100), "packed tensors"),
    ],
)
def test_a_bad_update_is_refused_by_name_and_the_round_goes_on(
    fleet_of: FleetOf, spoil: Any, words: str
) -> None:
    table = Table(fleet_of("a", "b"))
    table.fake.spoil["b"] = spoil
    joined, _ = table.train()
    (refused,) = table.fake.all("device_refused")
    assert refused["device"] == "b"
    assert words in str(refused["reason"])
    np.testing.assert_allclose(product(joined), table.step("a"), atol=1e-6)


# ---------------------------------------------------------------- measuring


def test_an_evaluation_is_weighted_by_units_and_lists_devices(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("b", "a"))
    table.fake.measured["a"] = {"held_out_loss": 4.0, "held_out_units": 30.0, "accuracy": 0.5}
    table.fake.measured["b"] = {"held_out_loss": 1.0, "held_out_units": 10.0, "accuracy": 1.0}
    assert table.evaluate() == pytest.approx(3.25)
    (found,) = table.fake.all("evaluated")
    assert found["accuracy"] == pytest.approx(0.625)
    assert found["devices"] == {"a": 4.0, "b": 1.0}
    assert found["round"] == 0


@pytest.mark.parametrize(
    "measured", [{}, {"held_out_units": 5.0}, {"held_out_loss": 9.0}, {"accuracy": 1.0}]
)
def test_a_device_that_measures_nothing_does_not_count(
    fleet_of: FleetOf, measured: dict[str, float]
) -> None:
    table = Table(fleet_of("a", "b"))
    table.fake.measured["b"] = measured
    assert table.evaluate() == 1.0
    assert table.train()[1] == 1.0


def test_nothing_measured_is_no_loss(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a"))
    table.fake.measured["a"] = {}
    assert table.evaluate() is None
    assert table.fake.all("evaluated")[0]["accuracy"] is None


def test_a_device_that_is_lost_while_measuring_is_left_out(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a", "b"), deadline_s=0.3)
    assert table.evaluate(lost="a") == 2.0
    (refused,) = table.fake.all("device_refused")
    assert refused["device"] == "a"
