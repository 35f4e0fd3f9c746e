"""`fedtune watch RUN`: a run as it goes on, with alarms; it only reads.

A run on this machine is read from its folder; a name of no folder here is asked of a coordinator.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fedtune.cli.coordinator import (
    CoordinatorFile,
    Insecure,
    coordinator,
    follow,
    is_elsewhere,
    say_which,
)
from fedtune.cli.display import JsonLines, LiveDisplay
from fedtune.export.run_place import holds_run, run_place
from fedtune.export.run_settings import devices_at_once
from fedtune.export.watching import RunWatch

_EXIT_NOT_FINISHED = 2


def watch(
    run: Annotated[
        str, typer.Argument(help="folder of the run, its name below runs/ or at a coordinator")
    ],
    json_lines: Annotated[
        bool, typer.Option("--json", help="print one JSON object per event and alarm")
    ] = False,
    coordinator_file: CoordinatorFile = None,
    insecure: Insecure = False,
) -> None:
    """Follow a run until it ends or Ctrl-C, and say what needs attention.

    The exit code is 0 if the run finished, and 2 if it failed, was interrupted or was killed.
    """
    folder = run_place(run)
    if is_elsewhere(run, coordinator_file):
        with coordinator(coordinator_file, insecure) as at:
            at.run(run)  # refuses a name that is none before anything is shown
            follow(at, run, json_lines=json_lines)
        return
    say_which(folder, run)
    if not holds_run(folder):
        typer.echo(f"waiting for a run in {folder}", err=True)
    following = RunWatch(folder)
    display = (
        JsonLines()
        if json_lines
        else LiveDisplay(at_once=devices_at_once(folder), without_end="was not seen to end")
    )
    with display:
        for event in following.events():
            display(event)
    if following.state != "finished":
        raise typer.Exit(_EXIT_NOT_FINISHED)
