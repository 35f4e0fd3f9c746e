"""The terminal's map of ranks: marks by rank, folded where there is little room."""

from __future__ import annotations

import io

from rich.console import Console

from fedtune.cli.plan_pages import Group, groups_of, plan_tables, rank_maps
from fedtune.plan.settings import PlanSettings
from fedtune.records import (
    DevicePlan,
    DeviceProfile,
    FleetPlan,
    MatrixPlan,
    MatrixShape,
    ModelShapes,
)

LAYERS = 40
SHAPES = ModelShapes(
    "", "llama", 64, 64, LAYERS, 4, 100,
    tuple(MatrixShape(f"h.{at}.q_proj", 64, 64, at) for at in range(LAYERS)), 0,
)  # fmt: skip
SETTINGS = PlanSettings(rank_max=8, rank_cap=8, batch_size=4, local_steps=2, sequence_length=16)


def device(name: str, ranks: list[int], steps: int = 2) -> DevicePlan:
    matrices = tuple(
        MatrixPlan(shape.name, rank, "fp32")
        for shape, rank in zip(SHAPES.matrices, ranks, strict=True)
    )
    return DevicePlan(name, matrices, 4, 4, 16, steps)


def groups(*plans: DevicePlan, classes: dict[str, str] | None = None) -> list[Group]:
    known = classes or {}
    profiles = [
        DeviceProfile(plan.device, known.get(plan.device, "any"), 1, 10**8) for plan in plans
    ]
    names = sorted({profile.device_class for profile in profiles}, reverse=True)
    return groups_of(FleetPlan(plans), profiles, SHAPES, SETTINGS, names)


def lines(found: list[Group], width: int, ascii_only: bool = False) -> list[str]:
    return [text.plain for text in rank_maps(found, width, ascii_only)]


def test_a_mark_is_taller_for_a_higher_rank_and_a_frozen_matrix_has_a_dot() -> None:
    ranks = [0, 1, 2, 4, 8] + [8] * (LAYERS - 5)
    title, drawn, legend = lines(groups(device("a", ranks)), 80)
    assert title == "any"
    assert drawn == "q_proj  ·▁▂▄" + "█" * (LAYERS - 4)
    assert legend.endswith("· frozen, ▁ 1, ▂ 2, ▄ 4, █ 8")
    assert lines(groups(device("a", ranks)), 80, ascii_only=True)[1].startswith("q_proj  .1248")


def test_layers_share_a_mark_with_their_highest_rank_on_a_narrow_terminal() -> None:
    ranks = [0] * LAYERS
    ranks[5] = 8
    _, drawn, _ = lines(groups(device("a", ranks)), 28)
    assert drawn == "q_proj  " + "··█" + "·" * 17


def test_a_narrow_terminal_folds_what_the_marks_mean_and_cuts_no_rank() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=24)
    for line in rank_maps(groups(device("a", [1] * 20 + [8] * 20)), console.width, False):
        console.print(line)
    shown = stream.getvalue()
    assert "q_proj  " + "▁" * 6 in shown
    assert "█ 8" in shown
    assert all(len(line) <= 24 for line in shown.splitlines())


def test_classes_are_drawn_in_one_scale() -> None:
    low, high = device("a", [1] * 20 + [2] * 20), device("b", [4] * 20 + [8] * 20)
    drawn = lines(groups(low, high, classes={"a": "low", "b": "high"}), 80)
    assert drawn[1] == "q_proj  " + "▁" * 20 + "▂" * 20
    assert drawn[3] == "q_proj  " + "▄" * 20 + "█" * 20


def test_equal_ranks_are_one_line() -> None:
    assert lines(groups(device("a", [4] * LAYERS)), 80) == ["any: rank 4 everywhere"]


def test_devices_of_a_class_that_do_the_same_share_a_column() -> None:
    plans = [
        device(name, [4] * LAYERS, steps) for name, steps in zip("abcd", (1, 2, 2, 2), strict=True)
    ]
    found = groups(*plans)
    assert [(group.name, group.devices) for group in found] == [
        ("any 1", ("b", "c", "d")),
        ("any 2", ("a",)),
    ]
    (table,) = plan_tables(found, SHAPES, 80)
    assert [str(column.header) for column in table.columns] == ["", "any 1", "any 2"]


def test_wide_fleets_are_split_over_tables() -> None:
    plans = [device(f"d{steps}", [4] * LAYERS, steps) for steps in range(1, 8)]
    tables = list(plan_tables(groups(*plans), SHAPES, 80))
    assert [len(table.columns) - 1 for table in tables] == [3, 3, 1]
    assert len(list(plan_tables(groups(*plans), SHAPES, 10))) == 7
