"""`fedtune check RUN.toml`: whether a run can start, and what it would work on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli.amounts import bytes_text
from fedtune.cli.inspection import Inspection, ShownSample, inspect_run
from fedtune.config import load_run_config
from fedtune.settings import RunConfig


def check(
    run_file: Annotated[Path, typer.Argument(help="the run file, RUN.toml")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as run.rounds=3"),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", min=0, help="samples to show; 0 tokenises nothing and needs no extra"
        ),
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check a run file, its data and its model, and show what the model would read."""
    config = load_run_config(run_file, set_ or [])
    found = inspect_run(config, samples)
    if as_json:
        typer.echo(json.dumps(_as_json(config, found), ensure_ascii=False))
    else:
        _print(Console(), config, found)


def _as_json(config: RunConfig, found: Inspection) -> dict[str, object]:
    """The same facts as the tables, for programs."""
    shapes = found.shapes
    return {
        "run": config.run.name,
        "devices": config.devices,
        "model": {
            "folder": str(found.folder),
            "digest": shapes.digest,
            "model_type": shapes.model_type,
            "layers": shapes.layers,
            "matrices": {m.name: [m.out_features, m.in_features] for m in shapes.matrices},
            "adapted_parameters": sum(m.parameters for m in shapes.matrices),
            "other_parameters": shapes.other_parameters,
            "left": list(found.left),
        },
        "sites": [asdict(site) for site in found.sites],
        "labels": list(found.labels),
        "samples": [asdict(sample) for sample in found.samples],
        "warnings": list(found.warnings),
    }


def _print(console: Console, config: RunConfig, found: Inspection) -> None:
    console.print(_site_table(found))
    for line in _facts(config, found):
        console.print(Text(line), soft_wrap=True)
    if found.samples:
        marked = "in green" if console.is_terminal else "in [[ ]]"
        console.print(Text(f"samples  what the model learns to write stands {marked}"))
    for sample in found.samples:
        console.print()
        console.print(_sample_text(sample, colours=console.is_terminal), soft_wrap=True)
    for warning in found.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _site_table(found: Inspection) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("site")
    table.add_column("device")
    for name in ("train rows", "held out", "tokens", "longest"):
        table.add_column(name, justify="right")
    for site in found.sites:
        numbers = (site.train_rows, site.held_out_rows, site.tokens, site.longest)
        table.add_row(
            Text(site.name),
            Text(site.device_class),
            *("-" if number is None else f"{number:,}" for number in numbers),
        )
    return table


def _facts(config: RunConfig, found: Inspection) -> Iterator[str]:
    shapes = found.shapes
    adapted = sum(matrix.parameters for matrix in shapes.matrices)
    yield f"model    {config.model.path}: {shapes.model_type}, {shapes.layers} layers"
    yield (
        f"adapted  {len(shapes.matrices)} matrices, {adapted:,} of "
        f"{adapted + shapes.other_parameters:,} parameters, at ranks up to {config.lora.rank_max}"
    )
    if found.left:
        yield f"as is    {', '.join(found.left)}"
    classes = (
        f"{section.count} {name} ({bytes_text(section.memory)})"
        for name, section in config.fleet.items()
    )
    yield f"devices  {config.devices}: {', '.join(classes)}"
    if found.labels:
        yield f"labels   {len(found.labels)}: {', '.join(found.labels)}"


def _sample_text(sample: ShownSample, *, colours: bool) -> Text:
    """A sample's text; what carries loss in colour, or in [[ ]] where there are no colours."""
    cut = ", cut" if sample.truncated else ""
    text = Text(f"{sample.place} ({sample.site}, {len(sample.tokens)} tokens{cut})\n  ")
    for piece, learned in sample.pieces:
        words = piece.replace("\r", "\\r").replace("\n", "\\n")
        if colours:
            text.append(f"{words} ", style="green" if learned else "dim")
        else:
            text.append(f"[[{words}]] " if learned else f"{words} ")
    if sample.label:
        text.append(f"-> {sample.label}" if colours else f"-> [[{sample.label}]]", style="green")
    return text
