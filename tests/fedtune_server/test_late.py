"""Rounds that close before all their devices have answered, by a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedtune.aggregate.rules import Rule, make_rule
from fedtune.errors import ProtocolError, RoundError
from fedtune.records import Contribution, DevicePlan, GlobalAdapter, LoraScale, MatrixPlan
from fedtune.wire.flower import TRAIN, from_record
from fedtune.wire.messages import OptimizerSpec, decode_train_instruction
from fedtune_server.clock import RealClock, VirtualClock
from fedtune_server.flights import Flights
from fedtune_server.policy import RoundPolicy
from fedtune_server.round import Outcome, train
from fedtune_server.sampling import Draw
from fedtune_server.simulation.delayed import DelayedGrid
from fedtune_server.starts import start_of
from fedtune_server.state import Turns, with_turns
from fedtune_server.taken_up import NOTHING, TakenUp
from fedtune_server.terms import RoundTerms

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
UP = "layers.0.up"


@dataclass
class Table:
    """A fleet that plays rounds one after another, with seconds by (device, round).

    Attributes:
        seconds: (device, round) -> what the device takes; 1 where it says nothing, and never where
            it says infinity.
        adapters: the state before each round, and the last.
    """

    fake: Any
    policy: RoundPolicy
    seconds: Mapping[tuple[str, int], float] = field(default_factory=dict)
    deadline_s: float = 10.0
    minimum: int = 1
    count: int = 0
    caps: Mapping[str, int] = field(default_factory=dict)
    plan_anew: Any = None
    already: TakenUp = NOTHING

    def __post_init__(self) -> None:
        self.clock = VirtualClock()
        self.flights = Flights(self.clock)
        self.rule: Rule = make_rule("delta", 12)
        self.adapters: list[GlobalAdapter] = [self.rule.start(self.fake.shapes.matrices, {})]
        self.turns: dict[str, Turns] = {}
        shapes = self.fake.shapes
        self.terms = RoundTerms(
            run="run-1",
            base_digest=shapes.digest,
            shapes=shapes.by_name(),
            scale=LoraScale(2.0),
            down="fp32",
            up="fp32",
            weights="samples",
            minimum_devices=self.minimum,
            deadline_s=self.deadline_s,
            seed=0,
            policy=self.policy,
        )

    def play(self, rounds: int) -> list[Outcome]:
        outcomes = []
        with DelayedGrid(
            self.fake._app(), len(self.fake.names), delay=self._takes, clock=self.clock
        ) as grid:
            fleet = self.fake.gather(grid)
            for _ in range(rounds):
                number = len(self.adapters)
                outcome = train(
                    grid, fleet, self.rule, self.adapters[-1], self.plans(), OptimizerSpec(),
                    self.terms, number, self.fake.open_rounds, evaluate=True,
                    emit=self.fake.events.append, flights=self.flights, already=self.already,
                    draw=Draw(self.count, 0, "fair", self.turns, self.caps),
                    plan_anew=self.plan_anew,
                )  # fmt: skip
                self.turns = with_turns(self.turns, outcome.asked, number)
                self.adapters.append(outcome.joined)
                outcomes.append(outcome)
        return outcomes

    def plans(self) -> list[DevicePlan]:
        matrices = (MatrixPlan(UP, 2, "fp32"), MatrixPlan("layers.0.down", 0, "fp32", tail_rank=4))
        return [DevicePlan(name, matrices, 2, 4, 16, 3) for name in sorted(self.fake.names)]

    def step(self, device: str, round: int) -> np.ndarray:
        """What the device's work of a round changes in the product of `up`."""
        (plan,) = [plan for plan in self.plans() if plan.device == device]
        sent = start_of(self.rule, self.adapters[round - 1], plan, self.terms, round)
        pair = sent.dispatch.trained[UP]
        added = np.float32(0.01 * (self.fake.names.index(device) + 1))
        return np.asarray(replace(pair, b=pair.b + added).product() - pair.product())

    def change(self, round: int) -> np.ndarray:
        before, after = self.adapters[round - 1], self.adapters[round]
        return np.asarray(after.matrices[UP].product() - before.matrices[UP].product())

    def asked(self, round: int) -> list[str]:
        return [order.plan.device for order in self.fake.orders if order.round == round]

    def _takes(self, message: Message) -> float | None:
        if message.metadata.message_type != TRAIN:
            return None
        order = decode_train_instruction(from_record(message.content, TRAIN)[0])
        return self.seconds.get((order.plan.device, order.round), 1.0)


def samples(name: str) -> float:
    return 10.0 * ("abcdefghij".index(name) + 1)


def weighted(*parts: tuple[float, np.ndarray]) -> np.ndarray:
    total = sum(weight for weight, _ in parts)
    return np.asarray(sum(weight / total * step for weight, step in parts))


# ---------------------------------------------------------------- closing


def test_a_round_closes_when_enough_have_reported(fleet_of: FleetOf) -> None:
    slow = {("a", 1): 3.0, ("c", 1): 7.0}
    table = Table(fleet_of(*"abcd"), RoundPolicy(close_count=3), slow)
    table.play(1)
    (finished,) = table.fake.all("round_finished")
    assert [f["device"] for f in table.fake.all("device_reported")] == ["b", "d", "a"]
    assert (finished["reported"], finished["refused"], finished["late"]) == (3, 0, 1)
    assert finished["virtual_seconds"] == 3.0
    (late,) = table.fake.all("device_late")
    assert (late["round"], late["device"], late["seconds"]) == (1, "c", 3.0)


@pytest.mark.parametrize(
    ("fraction", "seconds"), [(0.25, 1.0), (0.5, 2.0), (0.51, 3.0), (0.75, 3.0), (1.0, 4.0)]
)
def test_a_round_closes_when_a_share_has_reported(
    fleet_of: FleetOf, fraction: float, seconds: float
) -> None:
    slow = {(name, 1): float(i + 1) for i, name in enumerate("abcd")}
    table = Table(fleet_of(*"abcd"), RoundPolicy(close_fraction=fraction), slow)
    table.play(1)
    assert table.fake.all("round_finished")[0]["virtual_seconds"] == seconds


def test_a_share_that_rounds_up_by_a_hair_is_not_one_device_more() -> None:
    assert 0.07 * 100 > 7
    assert RoundPolicy(close_fraction=0.07).enough(100, 1) == 7
    assert RoundPolicy(close_fraction=0.1).enough(4, 1) == 1
    assert RoundPolicy(close_fraction=0.1).enough(4, 3) == 3
    assert RoundPolicy(close_count=9).enough(4, 1) == 4


def test_a_round_closes_at_its_deadline(fleet_of: FleetOf) -> None:
    table = Table(fleet_of(*"abc"), RoundPolicy(late="fold"), {("b", 1): 10.5})
    table.play(1)
    (finished,) = table.fake.all("round_finished")
    assert (finished["reported"], finished["virtual_seconds"], finished["late"]) == (2, 10.0, 1)
    assert table.fake.all("device_refused") == []


def test_answers_at_one_moment_beyond_the_count_wait_for_the_next_round(fleet_of: FleetOf) -> None:
    table = Table(fleet_of(*"abcd"), RoundPolicy(close_count=2, late="fold"))
    table.play(2)
    first, second = (
        [f["device"] for f in table.fake.all("device_reported") if f["round"] == r] for r in (1, 2)
    )
    assert first == ["a", "b"]
    assert second[:2] == ["c", "d"]


# ---------------------------------------------------------------- late updates


def test_a_late_update_counts_in_a_later_round_by_its_staleness(fleet_of: FleetOf) -> None:
    policy = RoundPolicy(close_count=2, late="fold", staleness_power=0.5)
    table = Table(fleet_of(*"abc"), policy, {("b", 1): 2.5})
    outcomes = table.play(3)  # each round takes a second, so b's comes in the third
    assert [table.asked(round) for round in (1, 2, 3)] == [["a", "c", "b"], ["a", "c"], ["a", "c"]]
    own = [(samples(name), table.step(name, 3)) for name in "ac"]
    late = (samples("b"), table.step("b", 1) * 3**-0.5)
    np.testing.assert_allclose(table.change(3), weighted(*own, late), atol=1e-6)
    assert not np.allclose(table.change(3), weighted(*own), atol=1e-4)
    reported = [f for f in table.fake.all("device_reported") if f["round"] == 3]
    assert [(f["device"], f["staleness"]) for f in reported] == [("b", 2), ("a", 0), ("c", 0)]
    last = table.fake.all("round_finished")[-1]
    assert (last["reported"], last["folded"], last["late"]) == (3, 1, 0)
    assert outcomes[2].rounds == (1, 3)
    assert outcomes[2].metrics.keys() == {"a", "c"}  # b measured another adapter


def test_losses_of_a_round_are_those_of_its_own_adapter(fleet_of: FleetOf) -> None:
    policy = RoundPolicy(close_count=2, late="fold")
    table = Table(fleet_of(*"abc"), policy, {("c", 1): 1.5})
    table.play(2)
    finished = table.fake.all("round_finished")[1]
    assert finished["folded"] == 1
    assert finished["held_out_loss"] == pytest.approx((1 * 10 + 2 * 20) / 30)


def test_a_late_update_is_refused_where_the_policy_says_so(fleet_of: FleetOf) -> None:
    table = Table(fleet_of(*"abc"), RoundPolicy(close_count=2, late="refuse"), {("b", 1): 1.5})
    table.play(2)
    (refused,) = table.fake.all("device_refused")
    assert (refused["device"], refused["round"]) == ("b", 2)
    assert refused["reason"] == "update of b: it came after round 1 had closed"
    own = [(samples(name), table.step(name, 2)) for name in "ac"]
    np.testing.assert_allclose(table.change(2), weighted(*own), atol=1e-6)


def test_an_update_that_is_too_late_is_refused(fleet_of: FleetOf) -> None:
    policy = RoundPolicy(close_count=2, late="fold", staleness_limit=1)
    table = Table(fleet_of(*"abc"), policy, {("b", 1): 2.5})
    table.play(3)
    (refused,) = table.fake.all("device_refused")
    assert refused["reason"] == (
        "update of b: expected one of at most 1 rounds ago (rounds.staleness_limit), got one of 2 "
        "rounds ago"
    )


def test_a_device_at_work_is_asked_again_once_it_has_answered(fleet_of: FleetOf) -> None:
    policy = RoundPolicy(close_count=1, late="fold")
    table = Table(fleet_of(*"ab"), policy, {("b", 1): 2.5})
    table.play(4)
    assert [table.asked(round) for round in (1, 2, 3, 4)] == [["a", "b"], ["a"], ["a"], ["a", "b"]]


def test_a_device_that_never_answers_is_refused_once_and_then_asked_again(
    fleet_of: FleetOf,
) -> None:
    policy = RoundPolicy(late="fold", staleness_limit=1)
    table = Table(fleet_of(*"ab"), policy, {("b", 1): float("inf")}, deadline_s=10.0)
    table.seconds = {**table.seconds, ("a", 2): 9.0, ("a", 3): 9.0}
    table.play(4)  # of 10, 9, 9 and 1 seconds; b's message lives for 20
    (refused,) = table.fake.all("device_refused")
    assert refused["round"] == 3
    assert refused["reason"] == "its work of round 1: no answer within 20 s"
    asked = [f["devices"] for f in table.fake.all("round_started")]
    assert asked == [["a", "b"], ["a"], ["a"], ["a", "b"]]


def test_a_device_whose_time_is_over_between_rounds_is_asked_again(fleet_of: FleetOf) -> None:
    policy = RoundPolicy(late="fold", staleness_limit=1)
    table = Table(fleet_of(*"ab"), policy, {("b", 1): float("inf")}, deadline_s=10.0)
    table.play(1)
    table.clock.wait(0.0, 25.0)  # the join takes its time
    table.play(1)
    assert table.asked(2) == ["a", "b"]


def test_a_late_update_that_is_no_good_is_refused(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"abc")
    fake.spoil["b"] = lambda said, tensors: (replace(said, round=2), tensors)
    table = Table(fake, RoundPolicy(close_count=2, late="fold"), {("b", 1): 1.5})
    table.play(2)
    (refused,) = fake.all("device_refused")
    assert refused["reason"] == "update of b: expected round 1, got '2'"


def test_late_updates_leave_nothing_on_the_disk(fleet_of: FleetOf, tmp_path: Any) -> None:
    policy = RoundPolicy(close_count=2, late="fold")
    table = Table(fleet_of(*"abc"), policy, {("b", 1): 1.5})
    for outcome in table.play(2):
        for round in outcome.rounds:
            table.fake.open_rounds.close(round)
    assert list((tmp_path / "open").iterdir()) == []


# ---------------------------------------------------------------- rounds that do not wait


def test_an_asynchronous_round_closes_after_the_first_updates_of_any_round(
    fleet_of: FleetOf,
) -> None:
    seconds = {("a", r): 1.0 for r in range(1, 9)} | {("b", 1): 2.5, ("c", 1): 2.75}
    policy = RoundPolicy(mode="async", close_count=2, late="fold", staleness_power=1.0)
    table = Table(fleet_of(*"abc"), policy, seconds)
    table.play(3)
    reported = [
        (f["round"], f["device"], f["staleness"]) for f in table.fake.all("device_reported")
    ]
    # a's first work is in at 1, and no other is new to it before round 2.
    assert reported[:4] == [(1, "a", 0), (1, "b", 0), (2, "c", 1), (2, "a", 0)]
    second = weighted((samples("c"), table.step("c", 1) / 2), (samples("a"), table.step("a", 2)))
    np.testing.assert_allclose(table.change(2), second, atol=1e-6)
    took = [f["virtual_seconds"] for f in table.fake.all("round_finished")]
    assert took[0] == 2.5
    assert sum(took[:2]) == 3.5


def test_an_asynchronous_round_takes_one_update_of_a_device(fleet_of: FleetOf) -> None:
    """b's late work is in at 1.25 and its next at 1.5, while round 2 waits for another device."""
    policy = RoundPolicy(mode="async", close_count=2, late="fold")
    seconds = {("a", 1): 0.5, ("c", 1): 1.0, ("b", 1): 1.25, ("b", 2): 0.25, ("a", 2): 2.0,
               ("c", 2): 3.0}  # fmt: skip
    table = Table(fleet_of(*"abc"), policy, seconds)
    table.play(3)
    reported = [
        (f["round"], f["device"], f["staleness"]) for f in table.fake.all("device_reported")
    ]
    assert reported[:4] == [(1, "a", 0), (1, "c", 0), (2, "b", 1), (2, "a", 0)]
    assert reported[4] == (3, "b", 1)
    assert "b" in table.asked(2)


def test_an_asynchronous_round_ends_when_only_its_own_devices_are_at_work(
    fleet_of: FleetOf,
) -> None:
    """In round 2, b has reported and is on its next work, and a and c fail: nobody can come."""
    policy = RoundPolicy(mode="async", close_count=2, late="fold")
    fake = fleet_of(*"abc")
    table = Table(fake, policy, {("b", 1): 1.5, ("b", 2): 30.0}, deadline_s=100.0)

    def fail_in_round_2(said: Any, tensors: bytes) -> Any:
        if said.round == 2:
            raise ProtocolError("no power")
        return said, tensors

    fake.spoil = dict.fromkeys("ac", fail_in_round_2)
    table.play(2)
    finished = fake.all("round_finished")[1]
    assert (finished["reported"], finished["folded"], finished["refused"]) == (1, 1, 2)
    assert finished["virtual_seconds"] == 1.0


def test_so_many_devices_are_at_work_at_a_time(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"abcdefgh")
    table = Table(fake, RoundPolicy(mode="async", close_count=2, late="fold"), count=3)
    table.play(6)
    # Every update frees a place, and the round's last frees one for the next round.
    assert len(fake.all("device_reported")) == 12
    assert {f["reported"] for f in fake.all("round_finished")} == {2}
    assert len(fake.orders) <= 12 + 3
    assert {order.plan.device for order in fake.orders} == set("abcdefgh")


def test_an_asynchronous_round_of_failing_devices_ends(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"abc")

    def fail(said: Any, tensors: bytes) -> Any:
        raise ProtocolError("the plan does not fit")

    fake.spoil = dict.fromkeys("abc", fail)
    policy = RoundPolicy(mode="async", close_count=2, late="fold", repeats=1)
    with pytest.raises(RoundError, match="got 0 good and 6 refused"):
        Table(fake, policy).play(1)


# ---------------------------------------------------------------- playing again


def test_a_round_of_too_few_is_played_again_with_others(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"abcdef")
    table = Table(fake, RoundPolicy(repeats=2), minimum=3, count=3)
    first = Draw(3, 0).choose("abcdef", 1)
    bad, good = first[0], first[1:]
    fake.spoil[bad] = lambda said, tensors: (replace(said, run="run-0"), tensors)
    (outcome,) = table.play(1)
    (repeated,) = fake.all("round_repeated")
    assert (repeated["round"], repeated["attempt"], repeated["good"]) == (1, 2, 2)
    (other,) = repeated["devices"]
    assert other not in first
    steps = [(samples(name), table.step(name, 1)) for name in sorted((*good, other))]
    np.testing.assert_allclose(table.change(1), weighted(*steps), atol=1e-6)
    assert set(outcome.asked) == {*first, other}
    assert len(fake.all("device_refused")) == 1


def test_devices_that_failed_are_asked_again_last(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"abc")
    fake.spoil["a"] = lambda said, tensors: (replace(said, run="run-0"), tensors)
    table = Table(fake, RoundPolicy(repeats=3), minimum=3)
    with pytest.raises(RoundError, match="round 1 needs updates of 3 devices, got 2 good and 4"):
        table.play(1)
    assert [f["devices"] for f in fake.all("round_repeated")] == [["a"]] * 3
    assert [o.plan.device for o in fake.orders].count("b") == 1


def test_a_device_that_failed_once_and_then_reported_has_not_failed(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"ab")

    def fail_once(said: Any, tensors: bytes) -> Any:
        if len(fake.orders) == 1:
            raise ProtocolError("no power")
        return said, tensors

    fake.spoil["a"] = fail_once
    (outcome,) = Table(fake, RoundPolicy(), minimum=2).play(1)
    assert (outcome.failed, outcome.asked) == ((), ("a", "b"))


def test_no_repeats_fail_at_once(fleet_of: FleetOf) -> None:
    fake = fleet_of("a")
    fake.spoil["a"] = lambda said, tensors: (replace(said, run="run-0"), tensors)
    with pytest.raises(RoundError, match="got 0 good and 1 refused"):
        Table(fake, RoundPolicy(repeats=0)).play(1)


def test_a_device_late_in_the_first_attempt_counts_whole_in_the_next(fleet_of: FleetOf) -> None:
    table = Table(fleet_of(*"ab"), RoundPolicy(late="fold"), {("b", 1): 15.0}, minimum=2)
    table.play(1)
    (finished,) = table.fake.all("round_finished")
    assert (finished["reported"], finished["folded"], finished["virtual_seconds"]) == (2, 0, 15.0)
    steps = [(samples(name), table.step(name, 1)) for name in "ab"]
    np.testing.assert_allclose(table.change(1), weighted(*steps), atol=1e-6)


def test_devices_that_refuse_their_plans_get_new_ones(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"ab")

    def too_large(said: Any, tensors: bytes) -> Any:
        if fake.orders[-1].plan.local_steps == 3:
            raise ProtocolError("the plan needs 2 bytes and this site allows 1")
        return said, tensors

    fake.spoil = dict.fromkeys("ab", too_large)
    table = Table(fake, RoundPolicy())
    asked: list[tuple[str, ...]] = []

    def smaller(failed: tuple[str, ...]) -> Mapping[str, DevicePlan]:
        asked.append(failed)
        return {plan.device: replace(plan, local_steps=2) for plan in table.plans()}

    table.plan_anew = smaller
    (outcome,) = table.play(1)
    assert asked == [("a", "b")]
    assert outcome.failed == ()
    assert [order.plan.local_steps for order in fake.orders] == [3, 3, 2, 2]


def test_what_is_there_already_is_not_asked_for(fleet_of: FleetOf) -> None:
    first = Table(fleet_of(*"abc"), RoundPolicy())
    kept: list[Contribution] = []
    join = first.rule.join

    class Recorded:
        """Delta, which shows what it joins."""

        def __getattr__(self, name: str) -> Any:
            return getattr(first_rule, name)

        def join(self, adapter: Any, contributions: Any) -> Any:
            kept.extend(contributions)
            return join(adapter, contributions)

    first_rule = first.rule
    first.rule = Recorded()  # type: ignore[assignment]
    first.play(1)
    again = Table(first.fake, RoundPolicy(), already=TakenUp(tuple(kept[:2])))
    first.fake.orders.clear()
    (outcome,) = again.play(1)
    assert again.asked(1) == ["c"]
    assert outcome.asked == ("a", "b", "c")
    np.testing.assert_array_equal(first.change(1), again.change(1))


# ---------------------------------------------------------------- taking turns


def test_no_device_takes_part_more_often_than_it_may(fleet_of: FleetOf) -> None:
    fake = fleet_of(*"abc")
    table = Table(fake, RoundPolicy(), caps={"a": 1, "b": 2})
    table.play(3)
    assert [f["devices"] for f in fake.all("round_started")] == [["a", "b", "c"], ["b", "c"], ["c"]]


def test_a_run_whose_devices_have_all_had_their_turns_ends(fleet_of: FleetOf) -> None:
    table = Table(fleet_of("a"), RoundPolicy(), caps={"a": 1})
    with pytest.raises(RoundError, match="round 2 needs updates of 1 devices, got 0 good"):
        table.play(2)


# ---------------------------------------------------------------- answers


class Mirror:
    """A grid that answers every message twice, or in the name of another node."""

    def __init__(self, grid: Any, source: int | None = None) -> None:
        self._grid, self._source = grid, source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def pull_messages(self, ids: Any) -> list[Message]:
        replies = self._grid.pull_messages(ids)
        if self._source is not None:
            for reply in replies:
                reply.metadata.__dict__["_src_node_id"] = self._source
            return list(replies)
        return [reply for reply in replies for _ in range(2)]


def one_round(table: Table, source: int | None = None) -> Outcome:
    with table.fake.grid() as grid:
        fleet = table.fake.gather(grid)
        mirror: Any = Mirror(grid, source)
        return train(
            mirror, fleet, table.rule, table.adapters[0], table.plans(), OptimizerSpec(),
            table.terms, 1, table.fake.open_rounds, evaluate=True, emit=table.fake.events.append,
        )  # fmt: skip


def test_a_second_answer_is_refused_once_and_the_first_counts(fleet_of: FleetOf) -> None:
    table = Table(fleet_of(*"ab"), RoundPolicy())
    outcome = one_round(table)
    assert outcome.metrics.keys() == {"a", "b"}
    assert [(f["device"], f["reason"]) for f in table.fake.all("device_refused")] == [
        (name, f"{name} answered twice; its first answer counts") for name in "ab"
    ]


def test_an_answer_of_another_node_is_refused(fleet_of: FleetOf) -> None:
    table = Table(fleet_of(*"ab"), RoundPolicy(repeats=0))
    with pytest.raises(RoundError, match="got 0 good and 2 refused"):
        one_round(table, source=1001 + 7)
    reasons = {f["device"]: f["reason"] for f in table.fake.all("device_refused")}
    assert reasons["a"] == "expected an answer of node 1000, got one of 1008"


# ---------------------------------------------------------------- real time


def test_a_late_update_counts_on_a_real_clock_too(fleet_of: FleetOf) -> None:
    """Device b starts 0.4 s late, on a grid whose devices work at the same time."""
    import time

    from fedtune_server.simulation.grid import InProcessGrid

    fake = fleet_of(*"abc")
    policy = RoundPolicy(close_count=2, late="fold")
    table = Table(fake, policy)
    flights = Flights(RealClock())

    def slow(node: int, message: Message) -> float | None:
        train_at_b = (node, message.metadata.message_type) == (1001, TRAIN)
        return 0.4 if train_at_b and message.metadata.group_id == "1" else None

    with InProcessGrid(fake._app(), 3, workers=3, fault=slow) as grid:
        fleet = fake.gather(grid)
        for number in (1, 2):
            started = time.monotonic()
            outcome = train(
                grid, fleet, table.rule, table.adapters[-1], table.plans(), OptimizerSpec(),
                table.terms, number, fake.open_rounds, evaluate=True, emit=fake.events.append,
                flights=flights,
            )  # fmt: skip
            table.adapters.append(outcome.joined)
            if number == 1:
                assert time.monotonic() - started < 0.4
                time.sleep(0.6)
    reported = [(f["round"], f["device"], f["staleness"]) for f in fake.all("device_reported")]
    assert (2, "b", 1) in reported
    assert fake.all("round_finished")[0]["virtual_seconds"] is None
