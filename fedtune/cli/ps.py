"""`fedtune ps`: the runs of a coordinator."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedtune.cli.coordinator import CoordinatorFile, Insecure, coordinator
from fedtune.cli.run_table import print_runs, run_object
from fedtune.v1 import coordinator_pb2 as pb


def ps(
    coordinator_file: CoordinatorFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per run")] = False,
    insecure: Insecure = False,
) -> None:
    """List a coordinator's runs, the newest first. Times are UTC."""
    with coordinator(coordinator_file, insecure) as at:
        runs = at.ask("ListRuns", pb.ListRunsRequest()).runs
    if as_json:
        for run in runs:
            typer.echo(json.dumps(run_object(run), ensure_ascii=False))
    elif runs:
        print_runs(runs)
    else:
        typer.echo("no runs yet; start one with: fedtune run RUN.toml")
