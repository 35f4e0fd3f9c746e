"""When a device's measured time or memory asks for a new plan, and when it does not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, cycle, islice, pairwise, repeat

import pytest

from fedtune.records import DevicePlan, DeviceProfile, MatrixPlan
from fedtune_server.drift import (
    LONGEST_REST,
    MARGIN,
    REST_ROUNDS,
    Finding,
    Reading,
    Standing,
    judge,
    lowered,
    planned_step_seconds,
    reading,
)

OWN = 100_000_000
PEAK_SHARE = 0.95


def follow(
    loads: Iterable[float], threshold: float = 0.25
) -> tuple[list[int], list[Finding], Standing]:
    """Rounds of a device that is so many times slower than its profile; new plans are believed.

    Returns the rounds that ended in a new plan, the findings, and what is held true in the end.
    """
    standing, at, found = Standing(OWN), [], []
    for number, load in enumerate(loads, start=1):
        standing, finding = judge(
            standing,
            Reading(step_seconds=load),
            round=number,
            peak_bytes=int(PEAK_SHARE * OWN),
            step_seconds=standing.slowness,
            own_bytes=OWN,
            threshold=threshold,
        )
        if finding is not None:
            at.append(number)
            found.append(finding)
    return at, found, standing


def follow_memory(free: Iterable[float]) -> tuple[list[int], list[Finding], Standing]:
    """The same for free memory, as shares of what the device had at first; plans fill budgets."""
    standing, at, found = Standing(OWN), [], []
    for number, share in enumerate(free, start=1):
        standing, finding = judge(
            standing,
            Reading(free_bytes=int(share * OWN)),
            round=number,
            peak_bytes=int(PEAK_SHARE * standing.budget_bytes),
            step_seconds=0.0,
            own_bytes=OWN,
            threshold=0.25,
        )
        if finding is not None:
            at.append(number)
            found.append(finding)
    return at, found, standing


# ---------------------------------------------------------------- time


def test_a_device_that_stays_slow_is_planned_anew_after_two_rounds_and_once() -> None:
    at, found, standing = follow(repeat(2.0, 40))
    assert at == [2]
    assert found == [Finding("time", 2.0, 1.0)]
    assert standing.slowness == pytest.approx(2.0, rel=0.05)  # on a grid of a tenth


def test_a_device_that_is_faster_than_planned_is_planned_anew_too() -> None:
    at, found, standing = follow(repeat(0.4, 40))
    assert at == [2]
    assert standing.slowness == pytest.approx(0.4, rel=0.05)
    assert found[0].measured < found[0].planned


@pytest.mark.parametrize("load", [0.76, 0.9, 1.0, 1.1, 1.24])
def test_a_device_within_the_threshold_keeps_its_plan(load: float) -> None:
    assert follow(repeat(load, 20))[0] == []


def test_the_threshold_is_the_runs_own() -> None:
    assert follow(repeat(1.5, 20), threshold=0.6)[0] == []
    assert follow(repeat(1.7, 20), threshold=0.6)[0] == [2]


def test_one_slow_round_is_no_reason() -> None:
    assert follow([1, 1, 9, 1, 1, 9, 1, 1, 1, 9, 1])[0] == []


@pytest.mark.parametrize("loads", [(2.0, 1.0), (2.0, 0.4), (5.0, 1.0, 1.0)])
def test_a_load_that_comes_and_goes_each_round_never_changes_the_plan(
    loads: tuple[float, ...],
) -> None:
    assert follow(islice(cycle(loads), 200))[0] == []


def test_the_milder_of_two_slow_rounds_counts() -> None:
    _, (found,), _ = follow([10.0, 1.5, 1.5])
    assert found.measured == 1.5


@pytest.mark.parametrize("half", [2, 3, 5, 8])
def test_a_load_that_flaps_slowly_is_followed_ever_less_often(half: int) -> None:
    day = [3.0] * half + [1.0] * half
    at, _, standing = follow(islice(cycle(day), 400))
    assert len(at) <= 2 + math.log2(LONGEST_REST / REST_ROUNDS) + 400 / LONGEST_REST
    assert standing.rest >= 32
    between = [later - earlier for earlier, later in pairwise(at)]
    assert all(pause >= REST_ROUNDS for pause in between)


def test_a_device_that_slows_down_step_by_step_rests_no_longer_each_time() -> None:
    loads = chain.from_iterable(repeat(2.0**k, 8) for k in range(1, 6))
    at, _, standing = follow(loads)
    assert len(at) == 5
    assert standing.rest == REST_ROUNDS
    assert standing.slowness == pytest.approx(32, rel=0.1)


def test_within_a_rest_nothing_changes_and_after_it_what_was_seen_in_it_counts() -> None:
    at, _, _ = follow([2.0, 2.0, *repeat(8.0, 10)])
    assert at == [2, 2 + REST_ROUNDS]


def test_without_planned_seconds_there_is_nothing_to_compare() -> None:
    standing, finding = judge(
        Standing(OWN),
        Reading(step_seconds=5.0),
        round=3,
        peak_bytes=1,
        step_seconds=0.0,
        own_bytes=OWN,
        threshold=0.25,
    )
    assert (standing, finding) == (Standing(OWN), None)


# ---------------------------------------------------------------- memory


def test_memory_under_the_plans_peak_counts_at_once_and_leaves_a_margin() -> None:
    at, found, standing = follow_memory([1.0, 0.5, *repeat(0.5, 20)])
    assert at == [2]
    assert found == [Finding("memory", OWN // 2, int(PEAK_SHARE * OWN))]
    assert standing.budget_bytes == int(OWN / 2 / (1 + MARGIN))


def test_memory_that_still_carries_the_plan_is_enough() -> None:
    assert follow_memory(repeat(0.951, 20))[0] == []


def test_memory_that_keeps_falling_counts_also_within_a_rest() -> None:
    at, _, standing = follow_memory([0.8, 0.6, 0.4, 0.2])
    assert at == [1, 2, 3, 4]
    assert standing.budget_bytes < 0.2 * OWN


def test_memory_that_wavers_a_little_changes_the_plan_once() -> None:
    assert follow_memory(islice(cycle([0.9, 0.88, 0.92, 0.87]), 100))[0] == [1]


def test_memory_that_comes_back_and_stays_is_given_back_after_the_rest() -> None:
    at, found, standing = follow_memory([0.5, *repeat(1.0, 20)])
    assert at == [1, 1 + REST_ROUNDS]
    assert standing.budget_bytes == OWN
    assert found[1] == Finding("memory", OWN, int(OWN / 2 / (1 + MARGIN)))


def test_the_less_of_two_rounds_of_returned_memory_counts() -> None:
    _, found, standing = follow_memory([0.5, 0.5, 0.5, 0.9, 0.7])
    assert [finding.cause for finding in found] == ["memory"] * 2
    assert standing.budget_bytes == int(0.7 * OWN / (1 + MARGIN))


def test_memory_that_comes_back_for_a_round_only_is_not() -> None:
    assert follow_memory([0.5, *islice(cycle([1.0, 0.5, 0.5]), 60)])[0] == [1]


def test_a_device_never_gets_more_than_it_had_at_first() -> None:
    _, _, standing = follow_memory([0.5, *repeat(7.0, 30)])
    assert standing.budget_bytes == OWN


def test_memory_that_flaps_is_given_back_ever_less_often() -> None:
    at, _, standing = follow_memory(islice(cycle([0.5] * 6 + [1.0] * 6), 400))
    assert len(at) < 20
    assert standing.rest == LONGEST_REST


def test_what_a_device_allows_in_a_refusal_is_held_with_the_margin() -> None:
    standing, found = lowered(Standing(OWN), 1000, "refusal", 3, 2000)
    assert standing.budget_bytes == 952
    assert standing.rests_until == 3 + REST_ROUNDS
    assert found == Finding("refusal", 1000, 2000)


# ---------------------------------------------------------------- what a device says


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, -1e300])
def test_numbers_that_cannot_be_are_left_out(value: float) -> None:
    assert reading({"step_seconds": value, "free_bytes": value}) == Reading(None, None)


def test_more_memory_than_any_machine_has_is_left_out() -> None:
    assert reading({"free_bytes": 1e30}).free_bytes is None
    assert reading({"free_bytes": 1.5e9}).free_bytes == 1_500_000_000


def test_a_report_that_says_nothing_changes_nothing() -> None:
    assert reading({"train_loss": 2.0}) == Reading(None, None)


@pytest.mark.parametrize("load", [1e6, 1e-6])
def test_a_pace_that_is_absurd_is_not_believed(load: float) -> None:
    at, _, standing = follow(repeat(load, 20))
    assert (at, standing.slowness) == ([], 1.0)


def test_seconds_of_a_step_are_those_of_the_plan_without_both_transfers() -> None:
    plan = DevicePlan(
        "a",
        (MatrixPlan("m", 1, "fp32"),),
        1,
        1,
        8,
        local_steps=4,
        seconds=10.0,
        download_bytes=300,
        upload_bytes=100,
    )
    profile = DeviceProfile("a", "any", 1, OWN, link_bytes_per_s=200.0)
    assert planned_step_seconds(plan, profile) == 2.0
    assert planned_step_seconds(plan, DeviceProfile("a", "any", 1, OWN)) == 2.5
