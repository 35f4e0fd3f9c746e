"""A whole run whose devices turn out other than planned, with devices that compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune.errors import PlanError, ProtocolError
from fedtune.export.quantities import bytes_text
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.records import DevicePlan, DeviceProfile, FleetPlan, MatrixPlan
from fedtune_server import planning as planning_module
from fedtune_server.coordinator import Coordinator
from fedtune_server.drift import MARGIN, REST_ROUNDS, Standing
from fedtune_server.replan import Replanner, held_profile, ranks_nest
from fedtune_server.roster import Counted
from fedtune_server.run_folder import RunFolder

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
Play = Callable[..., Any]
Said = Callable[[int], Mapping[str, float]]
"""Round -> what a device measures beside its losses."""

MEMORY = 60_000
"""The plan of a whole batch at once takes 56 kB of it, half a batch takes 31 kB."""
STEP_SECONDS = 0.32
"""What the profile below predicts of a step, within a twentieth."""
SETTINGS = PlanSettings(
    rank_max=3, rank_cap=6, batch_size=4, local_steps=10, sequence_length=16, round_seconds=4.0
)


@pytest.fixture
def tree() -> dict[str, dict[str, Any]]:
    return {
        "run": {"name": "unit", "rounds": 12, "round_deadline_s": 30.0},
        "model": {"path": "not/read/here"},
        "data": {"train": "not-read.jsonl", "max_tokens": 16},
        "fleet": {"any": {"count": 3, "memory": "1 GB"}},
        "importance": {"method": "uniform"},
        "lora": {"rank_max": 3, "rank_cap": 6},
        "plan": {"round_seconds": 4.0, "steps": "equal"},
        "train": {"batch_size": 4, "local_steps": 10, "evaluate_every": 0},
    }


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Play a run of a fake fleet; returns what the devices were ordered, by device."""
    with RunFolder.create(tmp_path) as folder:

        def run(fake: Any, tree: Any) -> dict[str, list[DevicePlan]]:
            config = parse_run_config(tree, "test")
            coordinator = Coordinator(config, fake.shapes, folder, fake.events.append)
            with fake.grid() as grid:
                coordinator.run(grid, Counted(len(fake.names)))
            return {
                name: [order.plan for order in fake.orders if order.plan.device == name]
                for name in fake.names
            }

        yield run


def profile(name: str, memory_bytes: int = MEMORY, **fields: Any) -> DeviceProfile:
    rates: dict[str, Any] = {
        "matmul_flops_per_s": {"fp32": 1e6},
        "memory_bandwidth_bytes_per_s": 1e9,
    }
    return DeviceProfile(name, "any", 1, memory_bytes, **{**rates, **fields})


def fleet_with_rates(fleet_of: FleetOf, *names: str) -> Any:
    fake = fleet_of(*names)
    for name in names:
        fake.change(name, profile=profile(name))
    return fake


def says(fake: Any, name: str, said: Said) -> None:
    """Let a device report what it measures."""

    def add(report: Any, tensors: bytes) -> Any:
        return replace(report, metrics={**report.metrics, **said(report.round)}), tensors

    fake.spoil[name] = add


def refuses_above(fake: Any, name: str, allowed: Callable[[int], int]) -> None:
    """Let a device refuse plans of more than it allows in a round, and say so when asked."""

    def check(report: Any, tensors: bytes) -> Any:
        plan = next(o.plan for o in reversed(fake.orders) if o.plan.device == name)
        now = allowed(report.round)
        fake.change(name, profile=profile(name, now))
        if plan.peak_bytes > now:
            raise ProtocolError(f"{name}: the plan needs {plan.peak_bytes} bytes")
        return report, tensors

    fake.spoil[name] = check


def work(plan: DevicePlan) -> DevicePlan:
    """A plan without what is predicted of it."""
    return replace(plan, seconds=0.0, peak_bytes=0, binding="")


# ---------------------------------------------------------------- time


def test_a_slow_device_takes_fewer_steps_and_the_others_keep_their_plans(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b", "c")
    for name, pace in (("a", 1.0), ("b", 3.0), ("c", 1.1)):
        says(fake, name, lambda _, pace=pace: {"step_seconds": pace * STEP_SECONDS})
    ordered = play(fake, tree)
    (event,) = fake.all("replanned")
    assert (event["device"], event["round"], event["cause"]) == ("b", 2, "time")
    assert event["measured_step_seconds"] == pytest.approx(3 * STEP_SECONDS)
    assert event["planned_step_seconds"] == pytest.approx(STEP_SECONDS, rel=0.05)
    assert event["measured_bytes"] is None
    assert "in 2 rounds in a row" in event["reason"]
    before, after = event["changed"]["local_steps"]
    assert before == 10
    assert after in (4, 5)  # of a round of 4 seconds
    assert [plan.local_steps for plan in ordered["b"]] == [before] * 2 + [after] * 10
    assert ordered["b"][-1].seconds <= 4.0
    for name in "ac":
        assert set(ordered[name]) == {ordered[name][0]}


def test_a_load_that_comes_and_goes_leaves_the_plan_alone(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b")
    says(fake, "b", lambda round: {"step_seconds": STEP_SECONDS * (4.0 if round % 2 else 1.0)})
    ordered = play(fake, tree)
    assert fake.all("replanned") == []
    assert set(ordered["b"]) == {ordered["b"][0]}


def test_a_new_plan_that_changes_nothing_corrects_the_prediction_without_a_word(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    tree["plan"]["round_seconds"] = 0.0
    fake = fleet_with_rates(fleet_of, "a", "b")
    says(fake, "b", lambda _: {"step_seconds": 2 * STEP_SECONDS})
    ordered = play(fake, tree)
    assert fake.all("replanned") == []
    assert work(ordered["b"][0]) == work(ordered["b"][-1])
    assert ordered["b"][-1].seconds == pytest.approx(20 * STEP_SECONDS, rel=0.1)
    rounds = [event["planned_seconds"] for event in fake.all("round_finished")]
    assert rounds == [plan.seconds for plan in ordered["b"]]
    (planned,), (finished,) = fake.all("planned"), fake.all("run_finished")
    assert planned["makespan_seconds"] == rounds[0]
    assert finished["planned_seconds"] == pytest.approx(sum(rounds))


def test_what_cannot_have_been_measured_changes_nothing(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b", "c")
    says(fake, "a", lambda _: {"step_seconds": -5.0, "free_bytes": -1.0})
    says(fake, "b", lambda _: {"step_seconds": 1e9, "free_bytes": 0.0})
    says(fake, "c", lambda _: {"step_seconds": 0.0, "free_bytes": 1e40})
    ordered = play(fake, tree)
    assert fake.all("replanned") == []
    assert {work(plan) for plan in ordered["b"]} == {work(ordered["b"][0])}


def test_a_run_that_wants_no_new_plans_gets_none(fleet_of: FleetOf, play: Play, tree: Any) -> None:
    tree["plan"]["replan"] = False
    fake = fleet_with_rates(fleet_of, "a", "b")
    says(fake, "a", lambda _: {"step_seconds": 9 * STEP_SECONDS})
    refuses_above(fake, "b", lambda round: MEMORY if round == 1 else MEMORY // 2)
    ordered = play(fake, tree)
    assert fake.all("replanned") == []
    assert len(set(ordered["a"] + [replace(plan, device="a") for plan in ordered["b"]])) == 1


# ---------------------------------------------------------------- memory


def test_a_device_whose_memory_falls_gets_a_plan_that_fits_and_back_when_it_returns(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b")
    free = MEMORY * 2 // 3
    says(fake, "b", lambda round: {"free_bytes": float(free if round < 4 else MEMORY)})
    ordered = play(fake, tree)
    fell, rose = fake.all("replanned")
    assert (fell["round"], fell["cause"], fell["measured_bytes"]) == (1, "memory", free)
    assert fell["planned_bytes"] == ordered["b"][0].peak_bytes
    takes = bytes_text(ordered["b"][0].peak_bytes)
    assert fell["reason"] == f"40.0 kB of memory are free, the plan takes {takes}"
    assert fell["changed"]["micro_batch"] == [4, 2]
    assert ordered["b"][1].peak_bytes <= free / (1 + MARGIN)
    assert rose["round"] == max(1 + REST_ROUNDS, 5)
    assert rose["reason"].startswith("plans may take 60.0 kB of memory again")
    assert work(ordered["b"][-1]) == work(ordered["b"][0])
    assert set(ordered["a"]) == {ordered["a"][0]}


def test_a_device_that_refuses_its_plan_is_planned_within_what_it_allows(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b")
    refuses_above(fake, "b", lambda round: MEMORY if round < 3 else MEMORY * 2 // 3)
    ordered = play(fake, tree)
    assert [event["round"] for event in fake.all("device_refused")] == [3]
    (event,) = fake.all("replanned")
    assert (event["round"], event["cause"]) == (3, "refusal")
    takes = bytes_text(ordered["b"][0].peak_bytes)
    assert event["reason"] == f"it refused its plan: it allows 40.0 kB, the plan takes {takes}"
    assert ordered["b"][3].peak_bytes <= MEMORY * 2 // 3
    assert len(ordered["b"]) == 12


def test_a_round_that_all_devices_refuse_is_played_again_with_plans_that_fit(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b")
    for name in "ab":
        refuses_above(fake, name, lambda round: MEMORY if round < 3 else MEMORY * 2 // 3)
    ordered = play(fake, tree)
    (repeated,) = fake.all("round_repeated")
    assert (repeated["round"], repeated["devices"], repeated["good"]) == (3, ["a", "b"], 0)
    assert {event["device"] for event in fake.all("replanned")} == {"a", "b"}
    assert [event["reported"] for event in fake.all("round_finished")] == [2] * 12
    assert [len(plans) for plans in ordered.values()] == [13, 13]
    assert all(plans[3].peak_bytes <= MEMORY * 2 // 3 for plans in ordered.values())


def test_a_device_that_no_plan_fits_any_more_keeps_its_plan_and_the_run_goes_on(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b", "c")
    refuses_above(fake, "b", lambda round: MEMORY if round < 3 else 100)
    says(fake, "c", lambda round: {"free_bytes": 40_000.0 if round == 3 else float(MEMORY)})
    ordered = play(fake, tree)
    assert len(fake.all("device_refused")) == 10
    warnings = [event["text"] for event in fake.all("warning")]
    assert len(warnings) == 1  # and not one in each round
    assert warnings[0].startswith("b cannot be planned anew (it refused its plan: it allows 100 B")
    assert "the smallest plan needs" in warnings[0]
    assert {event["device"] for event in fake.all("replanned")} == {"c"}
    assert set(ordered["b"]) == {ordered["b"][0]}


def test_a_device_that_no_longer_runs_its_format_gets_another(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_of("a", "b")
    both = {name: profile(name, formats=("fp32", "int8")) for name in "ab"}
    for name in "ab":
        fake.change(name, profile=both[name])

    def check(report: Any, tensors: bytes) -> Any:
        plan = next(o.plan for o in reversed(fake.orders) if o.plan.device == "b")
        if report.round >= 2:
            fake.change("b", profile=replace(both["b"], formats=("int8",)))
            if plan.matrices[0].format == "fp32":
                raise ProtocolError("b: the plan wants fp32, and this site supports int8")
        return report, tensors

    fake.spoil["b"] = check
    ordered = play(fake, tree)
    (event,) = fake.all("replanned")
    assert event["reason"] == "it refused its plan: it does not run fp32 any more"
    assert event["changed"]["format"] == ["fp32", "int8"]
    assert {m.format for m in ordered["b"][-1].matrices} == {"int8"}


def test_a_device_too_slow_for_any_plan_keeps_its_plan_and_is_named_once(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b")
    says(fake, "b", lambda _: {"step_seconds": 100 * STEP_SECONDS})
    ordered = play(fake, tree)
    (warning,) = fake.all("warning")
    assert warning["text"].startswith("b cannot be planned anew (a step took 32.0 s in 2 rounds")
    assert "raise plan.round_seconds" in warning["text"]
    assert fake.all("replanned") == []
    assert set(ordered["b"]) == {ordered["b"][0]}


def test_a_device_that_runs_no_useful_format_any_more_does_not_stop_the_others(
    fleet_of: FleetOf,
) -> None:
    fake = fleet_of("a", "b")
    profiles = [profile(name, formats=("fp32", "int8")) for name in "ab"]
    pins = {"any": Pins(format="fp32")}
    solve = partial(plan_fleet, shapes=fake.shapes, settings=SETTINGS, pins=pins)
    emit = fake.events.append
    replanner = Replanner(profiles, solve(profiles), solve, fake.shapes, 0.25, True, emit)
    changed = profile("b", formats=("int8",))
    for round in (1, 2):
        replanner.after_round(round, {}, {"b": changed})
    (warning,) = fake.all("warning")
    assert "b cannot be planned anew (it refused its plan: it does not run fp32" in warning["text"]
    assert "pinned to fp32" in warning["text"]
    replanner.after_round(3, {"a": {"free_bytes": 40_000.0}}, {"b": changed})
    assert [event["device"] for event in fake.all("replanned")] == ["a"]


def test_a_device_that_refuses_for_another_reason_keeps_its_plan(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    fake = fleet_with_rates(fleet_of, "a", "b")

    def fail(report: Any, tensors: bytes) -> Any:
        raise RuntimeError("the disk is full")

    fake.spoil["b"] = fail
    ordered = play(fake, tree)
    assert fake.all("replanned") == []
    assert set(ordered["b"]) == {ordered["b"][0]}


# ---------------------------------------------------------------- what surrounds it


def test_what_more_leaves_a_device_is_listed_before_it_does(
    fleet_of: FleetOf, play: Play, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more_for_the_fast(profiles: Any, *, settings: Any, **rest: Any) -> FleetPlan:
        fast = any(profile.matmul_flops_per_s["fp32"] > 1e6 for profile in profiles)
        return plan_fleet(profiles, settings=replace(settings, rank_max=3 if fast else 1), **rest)

    monkeypatch.setattr(planning_module, "plan_fleet", more_for_the_fast)
    fake = fleet_with_rates(fleet_of, "a", "b")
    says(fake, "b", lambda round: {"step_seconds": STEP_SECONDS / 2})
    play(fake, tree)
    (event,) = fake.all("replanned")
    assert event["changed"]["ranks"] == {name.name: [1, 3] for name in fake.shapes.matrices}
    first, second = fake.all("leaves_device")
    assert {t["name"] for t in first["tensors"]} == {t["name"] for t in second["tensors"]}
    assert sum(t["bytes"] for t in second["tensors"]) == 3 * sum(
        t["bytes"] for t in first["tensors"]
    )
    kinds = [e.kind for e in fake.events if e.kind in ("round_started", "leaves_device")]
    assert kinds[:4] == ["leaves_device", "round_started", "round_started", "leaves_device"]


def replanner_of(fake: Any, *profiles: DeviceProfile, reports: bool = True) -> Replanner:
    solve = partial(plan_fleet, shapes=fake.shapes, settings=SETTINGS)
    emit = fake.events.append
    return Replanner(profiles, solve(profiles), solve, fake.shapes, 0.25, reports, emit)


def test_a_plan_that_a_person_wrote_changes_only_when_a_device_refuses_it(
    fleet_of: FleetOf,
) -> None:
    fake = fleet_of("a", "b")
    replanner = replanner_of(fake, profile("a"), profile("b"), reports=False)
    said = {"step_seconds": 10 * STEP_SECONDS, "free_bytes": 20_000.0}
    for round in (1, 2, 3):
        replanner.after_round(round, {"a": said, "b": said}, {})
    assert fake.all("replanned") == []
    replanner.after_round(4, {"a": said}, {"b": profile("b", 20_000)})
    assert [event["device"] for event in fake.all("replanned")] == ["b"]
    assert replanner.plans["b"].peak_bytes <= 20_000 < replanner.plans["a"].peak_bytes


def test_devices_that_change_alike_in_one_round_get_like_plans_by_one_solve(
    fleet_of: FleetOf,
) -> None:
    fake = fleet_of("a", "b", "c")
    calls: list[int] = []

    def solve(profiles: Sequence[DeviceProfile]) -> FleetPlan:
        calls.append(len(profiles))
        return plan_fleet(profiles, fake.shapes, SETTINGS)

    profiles = [profile(name) for name in "abc"]
    emit = fake.events.append
    replanner = Replanner(profiles, solve(profiles), solve, fake.shapes, 0.25, True, emit)
    for round in (1, 2):
        paces = {name: {"step_seconds": pace} for name, pace in (("a", 1.0), ("b", 1.02))}
        replanner.after_round(round, paces, {})
    assert calls == [3, 3]
    assert replace(replanner.plans["a"], device="b") == replanner.plans["b"]
    assert replanner.plans["a"].local_steps < replanner.plans["c"].local_steps


def test_ranks_still_nest_after_some_devices_were_planned_anew(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    replanner = replanner_of(fake, *(profile(name, 16_200) for name in "abc"))
    free = {"a": 14_800.0, "b": 15_600.0, "c": 16_200.0}
    replanner.after_round(1, {name: {"free_bytes": value} for name, value in free.items()}, {})
    small, middle, large = (replanner.plans[name].ranks() for name in "abc")
    assert small != middle != large
    for matrix, rank in small.items():
        assert rank <= middle[matrix] <= large[matrix]


@pytest.mark.parametrize("nests", [True, False])
def test_all_devices_take_the_new_plan_where_ranks_would_no_longer_nest(
    fleet_of: FleetOf, nests: bool
) -> None:
    fake = fleet_of("a", "b", "c")
    up, down = (matrix.name for matrix in fake.shapes.matrices)

    def solve(profiles: Sequence[DeviceProfile]) -> FleetPlan:
        """One matrix is trained until a device has less memory, and then the other, or both."""
        less = any(profile.memory_bytes < MEMORY for profile in profiles)
        chosen = (down,) if not less else (up, down) if nests else (up,)
        return plan_fleet(profiles, fake.shapes, replace(SETTINGS, trainable=chosen))

    profiles = [profile(name) for name in "abc"]
    emit = fake.events.append
    replanner = Replanner(profiles, solve(profiles), solve, fake.shapes, 0.25, True, emit)
    replanner.after_round(1, {"b": {"free_bytes": 40_000.0}}, {})
    told = {event["device"]: event for event in fake.all("replanned")}
    assert set(told) == ({"b"} if nests else {"a", "b", "c"})
    assert told["b"]["cause"] == "memory"
    if not nests:
        assert told["a"]["cause"] == "fleet"
        assert told["a"]["reason"] == "ranks would no longer nest with those of b"
        assert told["a"]["measured_bytes"] is told["a"]["measured_step_seconds"] is None
    assert ranks_nest(replanner.plans.values())


def test_ranks_nest_if_each_two_devices_can_be_compared() -> None:
    def plan(device: str, one: int, other: int) -> DevicePlan:
        matrices = (MatrixPlan("m", one, "fp32"), MatrixPlan("n", other, "fp32"))
        return DevicePlan(device, matrices, 1, 1, 8, 1)

    assert ranks_nest([])
    assert ranks_nest([plan("a", 2, 1), plan("b", 4, 1), plan("c", 4, 4), plan("d", 2, 1)])
    assert ranks_nest([plan("a", 4, 4), plan("b", 0, 1)])
    assert not ranks_nest([plan("a", 2, 1), plan("b", 1, 4)])
    assert not ranks_nest([plan("a", 2, 0), plan("b", 0, 2)])
    assert not ranks_nest([plan("a", 4, 4), plan("b", 0, 3), plan("c", 2, 0)])


def test_an_accelerators_memory_is_its_own() -> None:
    card = profile("a", accelerator="cuda", accelerator_memory_bytes=5000)
    held = held_profile(card, Standing(4000, slowness=2.0))
    assert (held.memory_bytes, held.accelerator_memory_bytes) == (MEMORY, 4000)
    assert held.matmul_flops_per_s == {"fp32": 5e5}
    assert held.memory_bandwidth_bytes_per_s == 5e8


def test_an_error_of_the_planner_that_no_device_explains_is_not_hidden(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b")
    replanner = replanner_of(fake, profile("a"), profile("b"))

    def broken(profiles: Sequence[DeviceProfile]) -> FleetPlan:
        if len(profiles) > 1:
            raise PlanError("the fleet cannot be planned")
        return plan_fleet(profiles, fake.shapes, SETTINGS)

    replanner._solve = broken
    with pytest.raises(PlanError, match="the fleet cannot be planned"):
        replanner.after_round(1, {"a": {"free_bytes": 40_000.0}}, {})
