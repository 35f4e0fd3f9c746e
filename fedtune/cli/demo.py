"""`fedtune demo`: a federation that needs no download, from an empty folder to a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedtune.cli.demo_files import demo_folder, prepare_classification_demo, prepare_demo
from fedtune.cli.simulate import run_simulation_file


def demo(
    classification: Annotated[
        bool,
        typer.Option(
            "--classification", help="tune an encoder that comes as a pip package to tell topics"
        ),
    ] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="only make the files, and print the run file's path")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="where base and data are kept; default: a folder of the user's cache"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as run.rounds=3"),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="print one JSON object per event instead of a display")
    ] = False,
) -> None:
    """Run a federation without any download: make a small base and data, tune, export."""
    run_file = _prepare(classification, folder or demo_folder())
    if prepare:
        typer.echo(str(run_file))
        return
    run_simulation_file(run_file, set_ or [], json_lines=json_lines, overwrite=True)


def _prepare(classification: bool, folder: Path) -> Path:
    if classification:
        return prepare_classification_demo(folder / "classification")
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading this Python's documentation", total=1.0)

        def show(share: float, loss: float) -> None:
            text = f"making a base model (first time only), loss {loss:.2f}"
            bar.update(task, completed=share, description=text)

        return prepare_demo(folder, show)
