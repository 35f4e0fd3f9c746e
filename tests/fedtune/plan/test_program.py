"""Ranks and forms of a device by one program, against every other choice there is."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fedtune.plan import program as program_module
from fedtune.plan.candidates import ENOUGH_GAIN
from fedtune.plan.program import Program, Solution, solve
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.records import DevicePlan, DistortionTable
from tests.fedtune.plan.test_mixing import FORMATS, PLENTY, RUN, SHAPES, device, error, table

MB = 10**6
MILP = replace(RUN, solver="milp")


def plan(
    memory: float,
    run: PlanSettings = MILP,
    pins: Pins | None = None,
    distortion: DistortionTable | None = None,
) -> DevicePlan:
    fixed = {} if pins is None else {"c": pins}
    return plan_fleet(
        [device(memory)], SHAPES, run, pins=fixed, distortion=distortion or table()
    ).devices[0]


def coverage(found: DevicePlan) -> float:
    """Of the prior's gain."""
    return sum(1 / i for rank in found.ranks().values() for i in range(1, rank + 1))


def objective(found: DevicePlan, greedy: DevicePlan) -> float:
    lost = error(found, table()) / error(greedy, table())
    return coverage(found) / coverage(greedy) - (1 - ENOUGH_GAIN) * lost


def test_the_program_is_never_worse_than_the_greedy_plan_and_keeps_the_budget() -> None:
    better = 0
    for memory in np.linspace(3.4 * MB, 5.3 * MB, 9):
        greedy = plan(memory, replace(MILP, solver="greedy"))
        found = plan(memory)
        assert found.peak_bytes <= memory
        gained = objective(found, greedy) - objective(greedy, greedy)
        assert gained >= -1e-9
        better += gained > 1e-3
        same = ("micro_batch", "checkpointing", "local_steps", "sequence_length")
        assert all(getattr(found, name) == getattr(greedy, name) for name in same)
    assert better >= 2


def test_the_same_input_gives_the_same_program() -> None:
    assert plan(4 * MB) == plan(4 * MB)


def small(left: float, seconds: float, rng: np.random.Generator) -> Program:
    matrices, forms, ends = 3, 4, 4
    errors = np.sort(rng.uniform(0, 1, (matrices, forms)))[:, ::-1] / matrices
    sizes = np.sort(rng.uniform(1, 9, (matrices, forms)))
    costs = np.sort(rng.uniform(0, 4, (2, ends)))
    costs[:, 0] = 0
    return Program(
        ends=np.arange(3, 3 + ends),
        gain=np.sort(rng.uniform(0.7, 1.1, ends)),
        end_bytes=costs,
        end_seconds=np.arange(ends) * 0.3,
        errors=errors,
        sizes=sizes,
        seconds=sizes / 10,
        bytes_left=np.array([left, left + 0.5]),
        seconds_left=seconds,
    )


def value(program: Program, place: int, forms: tuple[int, ...]) -> float:
    """The objective to be maximised; minus infinity where a limit is broken."""
    rows = np.arange(len(forms))
    sizes = program.sizes[rows, list(forms)].sum()
    used = sizes + program.end_bytes[:, place]
    seconds = program.seconds[rows, list(forms)].sum() + program.end_seconds[place]
    if (used > program.bytes_left + 1e-9).any() or seconds > program.seconds_left + 1e-9:
        return -math.inf
    lost = (1 - ENOUGH_GAIN) * program.errors[rows, list(forms)].sum()
    return float(program.gain[place] - lost)


@pytest.mark.parametrize("seconds", [math.inf, 2.2])
def test_a_program_finds_the_best_of_all_choices(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_module, "_useful", lambda each: np.isfinite(each.errors))
    rng = np.random.default_rng(4)
    solved = 0
    for left in rng.uniform(4, 24, 25):
        program = small(left, seconds, rng)
        best = max(
            value(program, place, forms)
            for place in range(len(program.ends))
            for forms in product(range(4), repeat=3)
        )
        found = solve(program, 10.0)
        if found is None:
            assert best == -math.inf
            continue
        solved += 1
        assert found.finished
        place = int(found.end - program.ends[0])
        assert value(program, place, tuple(found.forms.tolist())) >= best - 2e-3
    assert solved > 10


def test_a_program_that_the_time_stops_says_so() -> None:
    rng = np.random.default_rng(0)
    matrices, forms = 400, 8
    sizes = np.sort(rng.integers(100, 10_000, (matrices, forms))).astype(float)
    program = Program(
        ends=np.array([1, 2]),
        gain=np.array([1.0, 1.01]),
        end_bytes=np.array([[0.0, 5e4], [0.0, 5e4]]),
        end_seconds=np.zeros(2),
        errors=1 / sizes,
        sizes=sizes,
        seconds=np.zeros_like(sizes),
        bytes_left=np.full(2, sizes.mean() * matrices),
        seconds_left=math.inf,
    )
    found = solve(program, 1e-6)
    assert found is None or not found.finished


def test_kinds_for_which_there_is_no_time_keep_the_greedy_plan_and_say_so() -> None:
    hurried = plan(4 * MB, replace(MILP, solver_seconds=1e-3))
    greedy = plan(4 * MB, replace(MILP, solver="greedy"))
    assert replace(hurried, binding=greedy.binding) == greedy
    assert hurried.binding == f"{greedy.binding}, solver limit"


def test_an_answer_that_is_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the straight lines, and not the exact model, are what a program knows."""

    def poor(program: Program, seconds: float) -> Solution:
        smallest = np.argmin(program.sizes, axis=1)
        return Solution(int(program.ends[0]), smallest, True)

    monkeypatch.setattr(program_module, "solve", poor)
    assert plan(4 * MB) == plan(4 * MB, replace(MILP, solver="greedy"))


def test_without_a_table_the_program_changes_nothing() -> None:
    profile = device(PLENTY)
    greedy = replace(MILP, solver="greedy")
    assert plan_fleet([profile], SHAPES, MILP) == plan_fleet([profile], SHAPES, greedy)


def test_pinned_ranks_and_formats_are_kept() -> None:
    found = plan(4 * MB, pins=Pins(rank=2))
    assert set(found.ranks().values()) == {2}
    pinned = plan(4 * MB, pins=Pins(format="q2"))
    assert {matrix.format for matrix in pinned.matrices} == {"q2"}


def test_ranks_nest_after_the_programs() -> None:
    sizes = (2.6, 3.0, 3.4, 4.2, 5.0)
    fleet = [replace(device(size * MB), name=f"d{size}", device_class=f"c{size}") for size in sizes]
    run = replace(MILP, makespan_weight=1.0)
    found = plan_fleet(fleet, SHAPES, run, distortion=table()).devices
    for place, weak in enumerate(found):
        for strong in found[place + 1 :]:
            pairs = zip(weak.matrices, strong.matrices, strict=True)
            assert all(low.rank <= high.rank for low, high in pairs)
    assert all(p.peak_bytes <= d.budget_bytes for p, d in zip(found, fleet, strict=True))


def test_only_formats_of_the_device_are_used() -> None:
    found = plan(4 * MB)
    assert {matrix.format for matrix in found.matrices} <= set(FORMATS)
    assert all(matrix.correction_rank in (0, 4, 8) for matrix in found.matrices)
