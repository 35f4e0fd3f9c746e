"""`fedtune client ...`: join a federation as a site."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.apps import load_app
from fedtune.cli.client_pull import pull
from fedtune.cli.client_start import start
from fedtune.cli.server import Compose, Docker, Systemd, chosen_services
from fedtune.deploy.operator import DEFAULT_SITE_HOME

client = typer.Typer(name="client", help="Join and run a site.", no_args_is_help=True)
client.command("start")(start)
client.command("pull")(pull)


@client.command("join")
def join(
    code: Annotated[str, typer.Argument(help="the join code, as `fedtune server invite` says it")],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the coordinator")],
    folder: Annotated[
        Path, typer.Option("--dir", help="the site's folder, which is made")
    ] = DEFAULT_SITE_HOME,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="JSONL file of the site's rows")
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option("--base", metavar="FOLDER", help="a base model on this machine; repeatable"),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="give a site that is there a new key; the rest stays")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="without TLS: everybody between can read and change")
    ] = False,
    systemd: Systemd = False,
    docker: Docker = False,
    compose: Compose = False,
) -> None:
    """Make the site's key, check the coordinator by the code, and enrol."""
    if insecure:
        typer.echo(
            "warning: --insecure: the join code and the site's token go over the network in the "
            "clear",
            err=True,
        )
    joined = load_app("client_join")(
        code,
        server,
        folder,
        data=data,
        bases=base or [],
        again=again,
        insecure=insecure,
        services=chosen_services(systemd=systemd, docker=docker, compose=compose),
    )
    typer.echo(f"joined as {joined.name}; the site's folder is {joined.home.path}")
    for path in joined.services:
        typer.echo(f"  {path}")
    if data is None and not again:
        typer.echo(f"next: set data.train in {joined.home.settings_file}")
    where = "" if folder == DEFAULT_SITE_HOME else f" {shlex.quote(str(folder))}"
    typer.echo(f"then: fedtune client start{where}")
