"""`fedtune plan RUN.toml`: what each device would do, what it costs and what binds, on paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedtune.cli.amounts import bytes_text, one_line, seconds_text
from fedtune.cli.paper import PaperPlan, plan_run
from fedtune.cli.plan_pages import MOST_GROUPS, Group, groups_of, plan_tables, rank_maps
from fedtune.config import load_run_config
from fedtune.errors import ConfigError
from fedtune.export.plan_picture import Panel, plan_picture
from fedtune.plan.describe import form_text, format_text, mean_bits
from fedtune.plan.plan_file import checksum, fleet_pace, plan_file, plan_text
from fedtune.records import ModelShapes
from fedtune.settings import RunConfig, parse_bytes

PLAN_NAME, PICTURE_NAME = "plan.json", "plan.svg"


def plan(
    run_file: Annotated[Path, typer.Argument(help="the run file, RUN.toml")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CLASS=]BYTES", help="memory of a device, such as till='1 GB'; or of all"
        ),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="plan.round_seconds, 0: none")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="plan.max_bytes, such as '5 MB'; 0: none")
    ] = None,
    importance: Annotated[
        Path | None, typer.Option(help="importance.json of an earlier run (importance.file)")
    ] = None,
    follow: Annotated[
        Path | None,
        typer.Option("--plan", help="check and price this plan instead of making one (plan.file)"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as lora.rank_max=8"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="folder of plan.json and plan.svg; default: plans/<run.name>"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a plan.json that was edited by hand")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Plan a run before it starts: show and write what each device would do and what it costs."""
    named = {
        "plan.round_seconds": ("--deadline", deadline),
        "plan.max_bytes": ("--max-bytes", max_bytes),
        "importance.file": ("--importance", importance),
        "plan.file": ("--plan", follow),
    }
    given = {key: pair for key, pair in named.items() if pair[1] is not None}
    overrides = [*(set_ or []), *(f"{key}={value}" for key, (_, value) in given.items())]
    config = load_run_config(run_file, overrides, {key: name for key, (name, _) in given.items()})
    config = with_budgets(config, budget or [])
    folder = output or Path("plans") / config.run.name
    if not overwrite:
        _refuse_to_lose(folder / PLAN_NAME, Path(config.plan.file) if config.plan.file else None)
    paper = plan_run(config)
    groups = groups_of(paper.plan, paper.profiles, paper.shapes, paper.settings, list(config.fleet))
    tree = plan_file(
        paper.plan,
        paper.profiles,
        paper.shapes,
        paper.settings,
        config.run.name,
        by_class=not paper.named,
    )
    _write(folder / PLAN_NAME, plan_text(tree))
    _write(folder / PICTURE_NAME, _picture(config.run.name, groups, paper.shapes))
    if as_json:
        typer.echo(json.dumps(_as_json(config, folder, paper, groups), ensure_ascii=False))
    else:
        _print(Console(), folder, paper, groups)


def with_budgets(config: RunConfig, budgets: Sequence[str]) -> RunConfig:
    """The run with other memories: `BYTES` for every class, `CLASS=BYTES` for one; later ones win.

    Raises:
        ConfigError: a size cannot be read, or there is no such class.
    """
    fleet = dict(config.fleet)
    for text in budgets:
        name, separator, size = text.rpartition("=")
        if separator and name.strip() not in fleet:
            raise ConfigError(
                f"--budget {text}: there is no class {name.strip()!r}; classes: {', '.join(fleet)}"
            )
        memory = _size(text, size)
        for device_class in [name.strip()] if separator else list(fleet):
            fleet[device_class] = fleet[device_class].model_copy(update={"memory": memory})
    return config.model_copy(update={"fleet": fleet})


def _size(text: str, size: str) -> int:
    size = size.strip()
    try:
        memory = int(size) if size.isdecimal() else parse_bytes(size)
    except ValueError as error:
        raise ConfigError(f"--budget {text}: expected {error}") from None
    if not isinstance(memory, int) or memory < 1:
        raise ConfigError(f"--budget {text}: expected a size above 0, such as '8 GB'")
    return memory


def _refuse_to_lose(path: Path, followed: Path | None) -> None:
    """Refuse to replace a plan that a person edited, unless it is the one that is followed."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        tree = None
    if followed is not None and followed.resolve() == path.resolve():
        return
    if not isinstance(tree, dict) or tree.get("checksum") != checksum(tree):
        raise ConfigError(
            f"{path} was edited and is not replaced; pass --plan {path} to check it, --output for "
            "another folder, or --overwrite"
        )


def _write(path: Path, text: str) -> None:
    """Replace a file; a reader finds the old one or the new one, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name another folder with --output"
        ) from None


def _picture(run: str, groups: Sequence[Group], shapes: ModelShapes) -> str:
    panels = [
        Panel(
            name=group.name,
            note=f"{_devices(len(group.devices))}, {_backbone(group, shapes)}",
            ranks={matrix.name: matrix.rank for matrix in group.plan.matrices},
        )
        for group in groups[:MOST_GROUPS]
    ]
    cut = f", the first {len(panels)} of {len(groups)} kinds of plans"
    return plan_picture(f"Trained ranks of {run}{cut if len(panels) < len(groups) else ''}", panels)


def _backbone(group: Group, shapes: ModelShapes) -> str:
    return format_text({m.format for m in group.plan.matrices}, mean_bits(group.plan, shapes))


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


# ---------------------------------------------------------------- printing


def _print(console: Console, folder: Path, paper: PaperPlan, groups: Sequence[Group]) -> None:
    shown = groups[:MOST_GROUPS]
    for table in plan_tables(shown, paper.shapes, console.width):
        console.print(table)
    if len(groups) > len(shown):
        console.print(Text(f"and {len(groups) - len(shown)} more kinds of plans in {PLAN_NAME}"))
    ascii_only = "utf" not in console.encoding.lower()
    for line in rank_maps(shown, console.width, ascii_only):
        console.print(line)
    console.print()
    console.print(Text(_fleet_line(paper)), soft_wrap=True)
    for note in paper.notes:
        console.print(Text(f"note: {one_line(note)}", style="yellow"), soft_wrap=True)
    console.print(Text(f"written: {folder / PLAN_NAME}, {folder / PICTURE_NAME}"), soft_wrap=True)


def _fleet_line(paper: PaperPlan) -> str:
    seconds, slowest = fleet_pace(paper.plan, _class_of(paper))
    down = bytes_text(sum(device.download_bytes for device in paper.plan.devices))
    up = bytes_text(sum(device.upload_bytes for device in paper.plan.devices))
    return (
        f"a round of all {_devices(len(paper.plan.devices))} takes {seconds_text(seconds)}, paced "
        f"by {', '.join(slowest)}; {down} down, {up} up"
    )


def _class_of(paper: PaperPlan) -> Mapping[str, str]:
    return {profile.name: profile.device_class for profile in paper.profiles}


def _as_json(
    config: RunConfig, folder: Path, paper: PaperPlan, groups: Sequence[Group]
) -> dict[str, object]:
    """The same facts as the tables, for programs."""
    seconds, slowest = fleet_pace(paper.plan, _class_of(paper))
    return {
        "run": config.run.name,
        "plan": str(folder / PLAN_NAME),
        "picture": str(folder / PICTURE_NAME),
        "devices": len(paper.plan.devices),
        "round_seconds": seconds,
        "paced_by": list(slowest),
        "groups": [_group_object(group, paper) for group in groups],
        "notes": list(paper.notes),
    }


def _group_object(group: Group, paper: PaperPlan) -> dict[str, object]:
    plan, cost = group.plan, group.cost
    return {
        "class": group.device_class,
        "devices": list(group.devices) if paper.named else len(group.devices),
        "format": _backbone(group, paper.shapes),
        "forms": {matrix.name: form_text(matrix.form) for matrix in plan.matrices},
        "ranks": {matrix.name: matrix.rank for matrix in plan.matrices},
        "first_trained_layer": plan.first_trained_layer,
        "micro_batch": plan.micro_batch,
        "batch_size": plan.batch_size,
        "checkpointing": plan.checkpointing,
        "sequence_length": plan.sequence_length,
        "local_steps": plan.local_steps,
        "memory_bytes": dict(cost.parts),
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": group.profile.budget_bytes,
        "seconds": plan.seconds,
        "compute_seconds": cost.compute_seconds,
        "transfer_seconds": cost.transfer_seconds,
        "download_bytes": plan.download_bytes,
        "upload_bytes": plan.upload_bytes,
        "limited_by": plan.binding,
    }
