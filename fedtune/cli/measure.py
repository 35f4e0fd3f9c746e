"""`fedtune measure RUN.toml`: what each matrix of the base loses in each form, as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedtune.config import cache_folder, load_run_config
from fedtune.errors import ConfigError, MissingExtraError
from fedtune.model.shapes import read_shapes
from fedtune.model.source import resolve_model
from fedtune.plan.describe import form_text
from fedtune.plan.mixing import candidate_forms
from fedtune.records import DistortionTable, MatrixForm, ModelShapes
from fedtune.settings import RunConfig
from fedtune.wire.distortion import distortion_json


def measure(
    run_file: Annotated[Path, typer.Argument(help="the run file, RUN.toml")],
    output: Annotated[
        Path, typer.Option(help="where the table is written; name it in plan.distortion")
    ] = Path("distortion.json"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as model.path=..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure what each matrix of the base loses in each form that the fleet may use."""
    config = load_run_config(run_file, set_ or [])
    folder = resolve_model(config.model.path, config.model.revision)
    shapes = read_shapes(folder, config.lora.targets)
    forms = _forms(config)
    table = _measured(folder, shapes, forms)
    output.write_text(json.dumps(distortion_json(table)) + "\n", encoding="utf-8")
    sums = {
        form_text(form): sum(errors[column] for errors in table.errors.values())
        for column, form in enumerate(table.forms)
    }
    if as_json:
        typer.echo(json.dumps({"file": str(output), "base": table.base_digest, "errors": sums}))
        return
    for name, error in sorted(sums.items(), key=lambda pair: pair[1]):
        typer.echo(f"{name:12s} squared error {error:.4g}")
    typer.echo(f"{len(table.errors)} matrices, {len(forms)} forms; set plan.distortion = {output}")


def _forms(config: RunConfig) -> tuple[MatrixForm, ...]:
    formats = {name for section in config.fleet.values() for name in section.formats}
    forms = candidate_forms(formats, config.plan.correction_rank)
    if not forms:
        raise ConfigError("no format under [fleet] can be mixed; bitsandbytes' formats are not")
    return forms


def _measured(folder: Path, shapes: ModelShapes, forms: tuple[MatrixForm, ...]) -> DistortionTable:
    try:
        from fedtune.importance.distortion import base_distortion
    except ImportError:
        raise MissingExtraError("torch", "train", "measuring a base model") from None
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("matrices"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(shapes.matrices))
        cache = cache_folder() / "distortion"
        return base_distortion(
            folder, shapes, forms, cache, lambda done, of: bar.update(task, completed=done)
        )
