"""`fedtune status RUN`: where a run stands, whether it goes on, is over or was killed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from fedtune.cli.status_page import print_status
from fedtune.export.run_place import find_run
from fedtune.export.run_view import view_run

_LOG_WIDTH = 120
"""Characters of a line where there is no terminal that has a width."""


def status(
    run: Annotated[str, typer.Argument(help="folder of the run, or its name below runs/")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show where a run stands: rounds, loss, bytes, devices, refusals and drift."""
    view = view_run(find_run(run))
    if as_json:
        typer.echo(json.dumps(asdict(view), ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_LOG_WIDTH)
    print_status(console, view)
