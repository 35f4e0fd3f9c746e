from __future__ import annotations

from fedtune.config import parse_run_config
from fedtune.plan.from_config import plan_pins, plan_settings


def tree(**plan: object) -> dict[str, object]:
    return {
        "run": {"name": "r"},
        "model": {"path": "m"},
        "data": {"train": "t.jsonl", "max_tokens": 128},
        "fleet": {"lab": {"count": 1, "memory": "1 GB", "upload": "2 MB"}},
        "plan": plan,
    }


def test_every_aim_of_the_plan_section_reaches_the_planner() -> None:
    aims: dict[str, object] = {
        "makespan_weight": 0.5,
        "gain_weight": 3.0,
        "steps": "equal",
        "max_bytes": "5 MB",
        "shortest_sequence": 32,
        "solver": "greedy",
        "solver_seconds": 3.0,
        "round_seconds": 9.0,
    }
    found = plan_settings(parse_run_config(tree(**aims), "test"), 0, "planned")
    assert (found.makespan_weight, found.gain_weight, found.steps) == (0.5, 3.0, "equal")
    assert (found.upload_bytes, found.shortest_sequence) == (5 * 10**6, 32)
    assert (found.solver, found.solver_seconds, found.round_seconds) == ("greedy", 3.0, 9.0)


def test_a_pull_to_the_start_keeps_a_copy_of_it() -> None:
    plain = parse_run_config(tree(), "test")
    pulled = parse_run_config({**tree(), "train": {"proximal": 0.1}}, "test")
    found = [plan_settings(config, 0, "planned").keeps_start for config in (plain, pulled)]
    assert found == [False, True]


def test_a_run_counts_gain_twice_as_much_as_makespan_unless_told_otherwise() -> None:
    config = parse_run_config(tree(), "test")
    found = plan_settings(config, 0, "planned")
    assert (found.makespan_weight, found.gain_weight) == (1.0, 2.0)
    assert (found.steps, found.solver, found.shortest_sequence) == ("planned", "milp", 0)
    assert plan_pins(config)["lab"].upload_bytes == 2 * 10**6
