"""`fedtune status RUN`: where a run stands, whether it goes on, is over or was killed.

A run on this machine is read from its folder; a name of no folder here is asked of a coordinator.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from fedtune.cli.coordinator import CoordinatorFile, Insecure, coordinator, is_elsewhere, say_which
from fedtune.cli.run_table import run_lines, run_object, site_line, site_object
from fedtune.cli.status_page import print_status
from fedtune.export.run_place import find_run
from fedtune.export.run_view import view_run
from fedtune.v1 import coordinator_pb2 as pb

_LOG_WIDTH = 120
"""Characters of a line where there is no terminal that has a width."""


def status(
    run: Annotated[
        str, typer.Argument(help="folder of the run, its name below runs/ or at a coordinator")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    coordinator_file: CoordinatorFile = None,
    insecure: Insecure = False,
) -> None:
    """Show where a run stands: rounds, loss, bytes, devices, refusals and drift."""
    if is_elsewhere(run, coordinator_file):
        with coordinator(coordinator_file, insecure) as at:
            info = at.run(run)
            known = at.ask("ListSites", pb.ListSitesRequest()).sites
        sites = [site for site in known if site.name in info.devices]
        tree = run_object(info) | {"site_states": [site_object(site) for site in sites]}
        text = [*run_lines(info), *map(site_line, sites)]
        lines = [json.dumps(tree, ensure_ascii=False)] if as_json else text
        typer.echo("\n".join(lines))
        return
    place = find_run(run)
    say_which(place, run)
    view = view_run(place)
    if as_json:
        typer.echo(json.dumps(asdict(view), ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_LOG_WIDTH)
    print_status(console, view)
