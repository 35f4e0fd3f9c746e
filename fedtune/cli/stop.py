"""`fedtune stop RUN` and `fedtune resume RUN`: whether a coordinator's run is to go on."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtune.cli.amounts import one_line
from fedtune.cli.coordinator import CoordinatorFile, Insecure, coordinator
from fedtune.v1 import coordinator_pb2 as pb

RunName = Annotated[str, typer.Argument(help="the run's name, run.name of its run file")]


def stop(
    run: RunName, coordinator_file: CoordinatorFile = None, insecure: Insecure = False
) -> None:
    """Stop a run: its sites end training within a step; what was saved stays."""
    _ask("StopRun", run, coordinator_file, insecure)
    typer.echo(f"go on with it by: fedtune resume {one_line(run)}", err=True)


def resume(
    run: RunName, coordinator_file: CoordinatorFile = None, insecure: Insecure = False
) -> None:
    """Go on with a run that was stopped or failed, from its last saved round."""
    _ask("ResumeRun", run, coordinator_file, insecure)
    typer.echo(f"follow it with: fedtune watch {one_line(run)}", err=True)


def _ask(method: str, run: str, file: CoordinatorFile, insecure: bool) -> None:
    with coordinator(file, insecure) as at:
        info = at.ask(method, pb.RunName(name=run))
    typer.echo(f"run {one_line(info.name)} is {one_line(info.state)}")
