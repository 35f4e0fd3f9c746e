"""A plan as a person reads it on a terminal: a column per class, and a map of its ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from fedtune.cli.amounts import bytes_text, one_line, seconds_text
from fedtune.export.plan_picture import Grid, rank_grid
from fedtune.plan.describe import format_text, mean_bits
from fedtune.plan.plan_file import kinds_of
from fedtune.plan.predict import PARTS, Prediction, predict
from fedtune.plan.settings import PlanSettings
from fedtune.records import DevicePlan, DeviceProfile, FleetPlan, ModelShapes

_LABEL_WIDTH = 15
_COLUMN_WIDTH = 21
"""Characters of a class's column with its spaces: three classes fit into 80. Longer values fold."""
MOST_GROUPS = 24
"""Columns that are printed; a fleet of more kinds of plans is in the files."""
_SHADES = "·▁▂▃▄▅▆▇█"
_ASCII_SHADES = ".12345678"


@dataclass(frozen=True, slots=True)
class Group:
    """Devices of one class that do the same.

    Attributes:
        name: of the class; with a number behind it where the class has several plans.
        plan: of the first of them.
    """

    name: str
    device_class: str
    devices: tuple[str, ...]
    plan: DevicePlan
    profile: DeviceProfile
    cost: Prediction


def groups_of(
    plan: FleetPlan,
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    classes: Sequence[str],
) -> list[Group]:
    """The kinds of plans of a fleet, by class, those of most devices first.

    Args:
        classes: names of the classes in the order in which they are shown.
    """
    order = {name: place for place, name in enumerate(classes)}
    by_name = {profile.name: profile for profile in profiles}
    members: dict[tuple[str, int], list[DevicePlan]] = {}
    for device, kind in zip(plan.devices, kinds_of(plan.devices), strict=True):
        members.setdefault((by_name[device.device].device_class, kind), []).append(device)
    ordered = sorted(members.items(), key=lambda item: (order[item[0][0]], -len(item[1])))
    of_class = [device_class for (device_class, _), _ in ordered]
    groups: list[Group] = []
    for place, ((device_class, _), plans) in enumerate(ordered):
        number = 1 + of_class[:place].count(device_class)
        several = of_class.count(device_class) > 1
        profile = by_name[plans[0].device]
        groups.append(
            Group(
                name=f"{device_class} {number}" if several else device_class,
                device_class=device_class,
                devices=tuple(device.device for device in plans),
                plan=plans[0],
                profile=profile,
                cost=predict(plans[0], profile, shapes, settings),
            )
        )
    return groups


def plan_tables(groups: Sequence[Group], shapes: ModelShapes, width: int) -> Iterator[Table]:
    """A column per group, in as many tables as the terminal's width asks for."""
    columns = max(1, (width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    for start in range(0, len(groups), columns):
        yield _table(groups[start : start + columns], shapes)


def _table(groups: Sequence[Group], shapes: ModelShapes) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True, style="dim")
    for group in groups:
        table.add_column(
            Text(one_line(group.name, 40)), overflow="fold", max_width=_COLUMN_WIDTH - 2
        )
    cells = [_cells(group, shapes) for group in groups]
    for label in cells[0]:
        values = [found[label] for found in cells]
        if any(values):
            table.add_row(label, *(Text(value or "-") for value in values))
    return table


def _cells(group: Group, shapes: ModelShapes) -> dict[str, str]:
    """Label -> value, in the order of the rows; a row that is empty for all is left out."""
    plan, cost = group.plan, group.cost
    budget = bytes_text(group.profile.budget_bytes)
    ranks = plan.ranks()
    only = f" ({one_line(group.devices[0], 40)})" if len(group.devices) == 1 else ""
    return {
        "devices": f"{len(group.devices)}{only}",
        "backbone": format_text({m.format for m in plan.matrices}, mean_bits(plan, shapes)),
        "rank": f"{_range(ranks.values())} in {len(ranks)} of {len(plan.matrices)}",
        "backward": _depth(plan, shapes),
        "micro-batch": f"{plan.micro_batch} of {plan.batch_size}",
        "checkpointing": "yes" if plan.checkpointing else "no",
        "sequence": f"{plan.sequence_length} tokens",
        "local steps": str(plan.local_steps),
        "memory": f"{bytes_text(plan.peak_bytes)} of {budget}",
        **{f"  {part}": _size(cost.parts.get(part, 0)) for part in PARTS},
        "a round": seconds_text(plan.seconds),
        "  compute": seconds_text(cost.compute_seconds),
        "  transfers": seconds_text(cost.transfer_seconds),
        "down": bytes_text(plan.download_bytes),
        "up": bytes_text(plan.upload_bytes),
        "limited by": one_line(plan.binding, 90) or "nothing",
    }


def _size(count: int) -> str:
    return bytes_text(count) if count else ""


def _range(ranks: Collection[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return f"{low}" if low == high else f"{low}-{high}"


def _depth(plan: DevicePlan, shapes: ModelShapes) -> str:
    """Which blocks the backward pass goes through."""
    first, last = plan.first_trained_layer, shapes.layers - 1
    if first == 0:
        return f"all {shapes.layers} layers"
    return f"layers {first} to {last}" if first < last else f"layer {last} only"


# ---------------------------------------------------------------- ranks by matrix and layer


def rank_maps(groups: Sequence[Group], width: int, ascii_only: bool) -> Iterator[Text]:
    """Matrices by layers for each group, a taller mark for a higher rank, and what a mark means.

    Where a model has more layers than the terminal has room, a mark stands for several, with the
    highest rank of them. One line says it all where no rank differs from another.
    """
    grids = [rank_grid({m.name: m.rank for m in group.plan.matrices}) for group in groups]
    highest = max((rank for grid in grids for rank in grid.ranks.values()), default=0)
    shades = _ASCII_SHADES if ascii_only else _SHADES
    for group, grid in zip(groups, grids, strict=True):
        title, same = Text(one_line(group.name, 40), style="bold"), set(grid.ranks.values())
        if len(same) == 1:
            yield title.append(f": rank {same.pop()} everywhere", style="not bold")
        else:
            yield title
            yield from _rank_map(grid, highest, width, shades)
    if any(len(set(grid.ranks.values())) > 1 for grid in grids):
        yield _legend(highest, shades)


def _rank_map(grid: Grid, highest: int, width: int, shades: str) -> Iterator[Text]:
    """A line per kind of matrix; a layer that lacks a kind has no mark."""
    label = max(len(kind) for kind in grid.kinds) + 2
    each = -(-len(grid.layers) // max(8, width - label))
    starts = range(0, len(grid.layers), each)
    spans = [grid.layers[start : start + each] for start in starts]
    for kind in grid.kinds:
        found = (
            [grid.ranks[kind, at] for at in span if (kind, at) in grid.ranks] for span in spans
        )
        text = "".join(shades[_shade(max(of), highest)] if of else " " for of in found)
        words = (f"{kind:<{label}}", "dim"), (text, "cyan")
        yield Text.assemble(*words, no_wrap=True, overflow="crop")


def _legend(highest: int, shades: str) -> Text:
    ranks = sorted({1, max(1, highest // 4), max(1, highest // 2), highest})
    shown = ", ".join(f"{shades[_shade(rank, highest)]} {rank}" for rank in ranks)
    return Text(f"ranks by matrix, layers left to right: {shades[0]} frozen, {shown}", style="dim")


def _shade(rank: int, highest: int) -> int:
    """Mark of a rank: 0 for a frozen matrix, 8 for the highest rank."""
    return 0 if rank == 0 else max(1, -(-8 * rank // highest))
