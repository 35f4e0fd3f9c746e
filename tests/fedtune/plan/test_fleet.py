"""What a plan does with a fleet whose devices are not alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import PlanError
from fedtune.plan import fleet as fleet_module
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.records import CostCalibration, DevicePlan, DeviceProfile, FleetPlan, ImportanceReport
from tests.fedtune.plan.test_solve import MB, SETTINGS, TINY, device

PACED = replace(SETTINGS, makespan_weight=1.0, local_steps=10)
FAST = device("fast", 64 * MB, flops=1e11, link=1e8)
MIDDLE = device("middle", 16 * MB, flops=1e10, link=1e7)
SLOW = device("slow", 2 * MB, flops=1e9, link=1e6)
THREE = (FAST, MIDDLE, SLOW)


def plans(
    profiles: Sequence[DeviceProfile], run: PlanSettings = PACED, **more: object
) -> dict[str, DevicePlan]:
    return plan_fleet(profiles, TINY, run, **more).by_device()  # type: ignore[arg-type]


def makespan(found: dict[str, DevicePlan]) -> float:
    return max(plan.seconds for plan in found.values())


def coverage(plan: DevicePlan) -> float:
    """By the prior, the share of all ranks' gain."""
    whole = sum(1 / rank for rank in range(1, 17)) * len(TINY.matrices)
    return sum(1 / i for rank in plan.ranks().values() for i in range(1, rank + 1)) / whole


def test_equal_devices_train_all_ranks_and_all_steps() -> None:
    twins = [device(name, 64 * MB, link=1e5) for name in ("a", "b")]
    for run in (PACED, replace(PACED, steps="equal"), replace(PACED, makespan_weight=0.0)):
        for plan in plans(twins, run).values():
            assert plan.local_steps == 10
            assert set(plan.ranks().values()) == {16}
            assert plan.binding == "rank-max"


def test_without_a_makespan_weight_every_device_does_what_it_would_alone() -> None:
    run = replace(PACED, makespan_weight=0.0)
    found = plans(THREE, run)
    assert {plan.local_steps for plan in found.values()} == {10}
    for profile in THREE:
        alone = plans([profile], run)[profile.name]
        assert coverage(found[profile.name]) <= coverage(alone) * (1 + 1e-9)
        assert coverage(found[profile.name]) >= 0.9 * coverage(alone)


def test_slow_devices_give_up_steps_so_that_none_holds_up_the_round() -> None:
    free, paced = plans(THREE, replace(PACED, makespan_weight=0.0)), plans(THREE)
    assert makespan(paced) < makespan(free) / 5
    assert paced["fast"].local_steps == 10
    assert set(paced["fast"].ranks().values()) == {16}
    assert 1 <= paced["slow"].local_steps < paced["middle"].local_steps < 10
    assert "of 10 steps" in paced["slow"].binding
    assert "makespan" in paced["slow"].binding
    pacer = max(paced.values(), key=lambda plan: plan.seconds)
    others = [p for p in paced.values() if p is not pacer and p.local_steps < 10]
    assert all(f"paced by class-{pacer.device}" in plan.binding for plan in others)


def test_the_weight_of_the_makespan_trades_gain_for_seconds() -> None:
    found = [plans(THREE, replace(PACED, makespan_weight=w)) for w in (0.0, 0.1, 1.0)]
    spans = [makespan(each) for each in found]
    gains = [sum(coverage(p) * p.local_steps for p in each.values()) for each in found]
    assert spans == sorted(spans, reverse=True)
    assert gains == sorted(gains, reverse=True)
    assert spans[0] > spans[-1]


def test_the_chosen_length_is_no_worse_than_any_other_limit() -> None:
    def objective(found: dict[str, DevicePlan]) -> float:
        gains = [math.log(coverage(plan) * plan.local_steps) for plan in found.values()]
        return mean(gains) - math.log(makespan(found))

    chosen = objective(plans(THREE))
    free = makespan(plans(THREE, replace(PACED, makespan_weight=0.0)))
    for share in (1.0, 0.5, 0.2, 0.1, 0.05, 0.03, 0.02):
        run = replace(PACED, makespan_weight=0.0, round_seconds=share * free)
        try:
            other = objective(plans(THREE, run))
        except PlanError:
            continue
        assert chosen >= other - 0.05


def test_equal_steps_keep_their_number_and_cost_rank_instead() -> None:
    run = replace(PACED, steps="equal")
    found = plans(THREE, run)
    assert {plan.local_steps for plan in found.values()} == {10}
    free = plans(THREE, replace(run, makespan_weight=0.0))
    assert makespan(found) <= makespan(free)
    limited = plans(THREE, replace(run, round_seconds=makespan(free) / 4))
    assert limited["slow"].local_steps < 10
    assert "round time" in limited["slow"].binding


def test_a_limit_of_the_round_is_kept_beside_the_weights() -> None:
    for seconds in (1.0, 2.0, 5.0):
        found = plans(THREE, replace(PACED, round_seconds=seconds))
        assert makespan(found) <= seconds * (1 + 1e-9)


def test_a_device_counts_by_its_samples() -> None:
    few = plans(THREE, samples={"fast": 1000, "middle": 1, "slow": 1})
    many = plans(THREE, samples={"fast": 1, "middle": 1, "slow": 1000})
    assert makespan(many) > 2 * makespan(few)
    assert many["slow"].local_steps == 10


def test_measured_costs_change_the_plan() -> None:
    twice = {"class-fast": CostCalibration(seconds_factor=2.0)}
    predicted, measured = plans([FAST]), plans([FAST], calibration=twice)
    sent = (predicted["fast"].download_bytes + predicted["fast"].upload_bytes) / 1e8
    assert measured["fast"].seconds - sent == pytest.approx(2 * (predicted["fast"].seconds - sent))
    more = {"class-slow": CostCalibration(bytes_factor=1.3)}
    before, after = plans([SLOW])["slow"], plans([SLOW], calibration=more)["slow"]
    assert coverage(after) < coverage(before)
    assert after.peak_bytes <= 2 * MB < 1.3 * before.peak_bytes


def test_a_device_of_unknown_rates_does_not_set_the_pace() -> None:
    unknown = replace(MIDDLE, matmul_flops_per_s={}, memory_bandwidth_bytes_per_s=0.0)
    unknown = replace(unknown, link_bytes_per_s=0.0)
    found = plans([FAST, unknown, SLOW])
    assert found["middle"].seconds == 0
    assert found["middle"].local_steps == 10
    assert found["slow"].local_steps < 10


def test_no_devices_have_a_plan_of_none() -> None:
    assert plan_fleet([], TINY, PACED) == FleetPlan(())


def test_a_tail_costs_a_slow_device_no_step_or_a_quarter_of_the_round() -> None:
    run = replace(PACED, tail=24, rank_cap=32, rank_max=8)
    slow_link = replace(SLOW, memory_bytes=64 * MB, link_bytes_per_s=3e5)
    found = plans([FAST, MIDDLE, slow_link], run)
    alone = plans([slow_link], replace(run, makespan_weight=0.0))["slow"]
    span, plan = makespan(found), found["slow"]
    sides = {m.name: m.out_features + m.in_features for m in TINY.matrices}
    tail = sum(m.tail_rank * sides[m.name] for m in plan.matrices) * run.wire.down
    assert plan.local_steps < 10
    assert tail / 3e5 <= 0.25 * span * 1.1
    assert max(m.tail_rank for m in plan.matrices) < max(m.tail_rank for m in alone.matrices)
    assert {m.tail_rank for m in found["fast"].matrices} == {24}


def test_a_limit_of_all_updates_holds_for_every_device() -> None:
    run = replace(PACED, upload_bytes=60_000)
    found = plans(THREE, run)
    assert max(plan.upload_bytes for plan in found.values()) <= 60_000
    assert "upload size" in found["fast"].binding
    own = {"class-fast": Pins(upload_bytes=20_000)}
    assert plans(THREE, run, pins=own)["fast"].upload_bytes <= 20_000
    with pytest.raises(PlanError, match=r"may send 100 B a round, .* raise plan\.max_bytes$"):
        plans(THREE, replace(run, upload_bytes=100))


def test_importance_at_the_top_ends_backpropagation_early() -> None:
    gains = {m.name: ((1.0,) if m.layer == 4 else (1e-3,)) * 16 for m in TINY.matrices}
    found = plans([SLOW], importance=ImportanceReport(gains))["slow"]
    assert found.first_trained_layer >= 3
    assert f"depth (layers from {found.first_trained_layer} up)" in found.binding


def test_a_device_without_room_for_whole_samples_cuts_them_if_it_may() -> None:
    run = replace(PACED, sequence_length=1024)
    tiny = device("tiny", 1.2 * MB)
    with pytest.raises(PlanError, match=r"or let samples be cut by plan\.shortest_sequence$"):
        plans([tiny], run)
    found = plans([tiny], replace(run, shortest_sequence=64))["tiny"]
    assert 64 <= found.sequence_length < 1024
    assert found.peak_bytes <= 1.2 * MB
    assert f"samples cut to {found.sequence_length} of 1024 tokens" in found.binding
    roomy = plans([FAST], replace(run, shortest_sequence=64))["fast"]
    assert roomy.sequence_length == 1024
    with pytest.raises(PlanError, match="samples of 900 tokens"):
        plans([tiny], replace(run, shortest_sequence=900))


def test_the_missing_bytes_are_named_and_enough() -> None:
    with pytest.raises(PlanError) as caught:
        plans([device("d", 0.5 * MB)])
    words = str(caught.value)
    missing = float(words.split(" kB are missing")[0].rsplit(" ", 1)[1])
    assert plans([device("d", 0.5 * MB + 1000 * missing)])["d"].ranks()
    with pytest.raises(PlanError, match="are missing"):
        plans([device("d", 0.5 * MB + 900 * missing)])
    tokens = int(words.split("(")[-1].split(" would do")[0])
    assert plans([device("d", 0.5 * MB)], replace(PACED, sequence_length=tokens))["d"].ranks()
    with pytest.raises(PlanError):
        plans([device("d", 0.5 * MB)], replace(PACED, sequence_length=tokens + 1))


strengths = st.tuples(
    st.floats(1.0 * MB, 32 * MB),
    st.sampled_from([1e9, 1e10, 1e11]),
    st.sampled_from([3e5, 1e6, 1e8]),
    st.sampled_from([("nf4",), ("fp32", "bf16", "int8", "nf4")]),
)


@settings(max_examples=40, deadline=None)
@given(
    fleet=st.lists(strengths, min_size=2, max_size=6),
    weight=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    steps=st.sampled_from(["planned", "equal"]),
    tail=st.sampled_from([0, 8]),
    limit=st.sampled_from([0.0, 60.0]),
)
def test_a_device_that_can_carry_more_never_has_less_rank(
    fleet: list[tuple[float, float, float, tuple[str, ...]]],
    weight: float,
    steps: str,
    tail: int,
    limit: float,
) -> None:
    run = replace(PACED, makespan_weight=weight, steps=steps, tail=tail, round_seconds=limit)
    profiles = [
        device(f"d{index}", memory, formats, link, flops)  # type: ignore[arg-type]
        for index, (memory, flops, link, formats) in enumerate(fleet)
    ]
    found = plans(profiles, run)
    for first, strong in zip(fleet, profiles, strict=True):
        plan = found[strong.name]
        assert plan.peak_bytes <= strong.budget_bytes
        assert plan.local_steps >= 1
        assert plan.ranks()
        for second, weak in zip(fleet, profiles, strict=True):
            if all(a >= b for a, b in zip(first[:3], second[:3], strict=True)) and set(
                first[3]
            ) >= set(second[3]):
                other = found[weak.name]
                pairs = zip(plan.matrices, other.matrices, strict=True)
                if first != second:
                    assert all(a.rank >= b.rank for a, b in pairs)


def test_devices_of_one_kind_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    table = fleet_module.make_table

    def counted(*arguments: object) -> object:
        solved.append(arguments)
        return table(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fleet_module, "make_table", counted)
    many = [replace(THREE[i % 3], name=f"site-{i:04d}") for i in range(600)]
    found = plan_fleet(many, TINY, PACED)
    assert len(solved) <= 6
    assert [plan.device for plan in found.devices] == sorted(p.name for p in many)
    few = plan_fleet([replace(p, name=f"site-{i:04d}") for i, p in enumerate(THREE)], TINY, PACED)
    assert found.devices[:3] == few.devices


def test_the_order_of_devices_changes_nothing() -> None:
    assert plan_fleet(THREE, TINY, PACED) == plan_fleet(THREE[::-1], TINY, PACED)
    assert isinstance(plan_fleet(THREE, TINY, PACED), FleetPlan)
