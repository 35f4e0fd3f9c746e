"""`fedtune run RUN.toml`: a run on the sites of a coordinator, which goes on by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.coordinator import CoordinatorFile, Insecure, coordinator, follow
from fedtune.config import load_run_config
from fedtune.errors import ConfigError
from fedtune.v1 import coordinator_pb2 as pb


def run(
    run_file: Annotated[Path, typer.Argument(help="the run file, with a section [deployment]")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as run.rounds=3"),
    ] = None,
    coordinator_file: CoordinatorFile = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a run of that name that has ended")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="do not follow the run; it goes on anyway")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="print one JSON object per event instead of a display")
    ] = False,
    insecure: Insecure = False,
) -> None:
    """Have a coordinator play a run on its sites, and follow it; Ctrl-C leaves it going.

    Given again, it continues a run that has ended, such as with more rounds. The exit code is 0 if
    the run finished or was left going by --detach, and 2 if it failed or was stopped.
    """
    config = load_run_config(run_file, set_ or [])
    if not config.deployment.sites:
        raise ConfigError(
            f"{run_file} has no deployment.sites: it is for simulations; add a section "
            '[deployment] with sites = ["NAME", ...], or sites = ["*"] for all that are enrolled'
        )
    name = config.run.name
    with coordinator(coordinator_file, insecure) as at:
        request = pb.StartRunRequest(config_json=config.model_dump_json(), overwrite=overwrite)
        info = at.ask("StartRun", request)
        typer.echo(f"run {name} is {info.state} at {at.service}", err=True)
        if detach:
            typer.echo(f"follow it with: fedtune watch {name}", err=True)
        else:
            follow(at, name, json_lines=json_lines)
