"""`fedtune init`: write a run file in which every key stands with its default and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.run_file import TemplateName, write_run_file


def init(
    path: Annotated[Path, typer.Argument(help="the file to write")] = Path("run.toml"),
    template: Annotated[
        TemplateName, typer.Option("--template", help="the task of the run")
    ] = TemplateName.CAUSAL_LM,
) -> None:
    """Write a run file with every key, its default, and what it means."""
    write_run_file(path, template)
    typer.echo(f"wrote {path}; set data.train and model.path in it, then: fedtune check {path}")
