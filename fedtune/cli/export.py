"""`fedtune export`: write a run's model and report in the forms that other tools read."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fedtune.export.run_export import EXPORT_FORMATS, export_run

# A member per format: typer shows the names in the help and refuses others.
FormatChoice = Enum("FormatChoice", {name: name for name in EXPORT_FORMATS}, type=str)  # type: ignore[misc]


def export(
    run_folder: Annotated[
        Path, typer.Argument(help="Folder of the run, such as runs/demo.", exists=True)
    ],
    formats: Annotated[
        list[FormatChoice] | None,
        typer.Option("--format", help="What to write; repeat for several. Default: all."),
    ] = None,
    base: Annotated[
        str,
        typer.Option(help="Base model to use in place of the run file's; must be the same model."),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Write a run's merged model, PEFT adapter, ONNX and report, from its latest checkpoint."""
    chosen = [choice.value for choice in formats] if formats else list(EXPORT_FORMATS)
    report = export_run(run_folder, chosen, base)
    if as_json:
        typer.echo(json.dumps({"paths": dict(report.paths), "skipped": dict(report.skipped)}))
        return
    for name, path in report.paths.items():
        typer.echo(f"{name:<8} {path}")
    for name, reason in report.skipped.items():
        typer.echo(f"{name:<8} skipped: {reason}")
