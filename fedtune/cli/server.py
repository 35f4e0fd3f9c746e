"""`fedtune server ...`: make a coordinator, and say which sites may take part."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedtune.cli.apps import load_app
from fedtune.cli.server_start import start
from fedtune.deploy.addresses import join_address
from fedtune.deploy.coordinator_home import (
    make_coordinator,
    rotate_authority,
    rotate_certificate,
    rotate_token,
)
from fedtune.deploy.homes import DEFAULT_PORT, CoordinatorHome
from fedtune.deploy.operator import DEFAULT_COORDINATOR_HOME
from fedtune.deploy.service_files import ServiceKind

server = typer.Typer(
    name="server", help="Make and run a coordinator, and invite sites.", no_args_is_help=True
)

server.command("start")(start)

Home = Annotated[Path, typer.Option("--dir", help="the coordinator's folder", show_default=True)]


Systemd = Annotated[bool, typer.Option("--systemd", help="write a systemd unit")]
Docker = Annotated[bool, typer.Option("--docker", help="write a Dockerfile")]
Compose = Annotated[bool, typer.Option("--compose", help="write a Dockerfile and compose.yaml")]
"""Which service files to write; of both sides."""


def chosen_services(*, systemd: bool, docker: bool, compose: bool) -> Sequence[ServiceKind]:
    """The service files that flags ask for."""
    asked = {
        ServiceKind.SYSTEMD: systemd,
        ServiceKind.DOCKER: docker,
        ServiceKind.COMPOSE: compose,
    }
    return [kind for kind, wanted in asked.items() if wanted]


@server.command("init")
def init(
    host: Annotated[str, typer.Option("--host", help="name or address that sites connect to")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="the folder to make")
    ] = DEFAULT_COORDINATOR_HOME,
    port: Annotated[
        int, typer.Option("--port", help="of Flower's link; the three behind it are used, too")
    ] = DEFAULT_PORT,
    systemd: Systemd = False,
    docker: Docker = False,
    compose: Compose = False,
) -> None:
    """Make a coordinator: keys, certificates, operator token, settings, and no sites yet."""
    services = chosen_services(systemd=systemd, docker=docker, compose=compose)
    made = make_coordinator(folder, host, port, services)
    typer.echo(f"made {made.home.path}")
    width = max(len(name) for name, _ in made.files)
    for name, purpose in made.files:
        typer.echo(f"  {name:<{width}}  {purpose}")
    where = _dir_option(folder)
    typer.echo(f"next: fedtune server invite SITE{where}")
    typer.echo(f"then: fedtune server start{_home_argument(folder)}")


@server.command("invite")
def invite(
    site: Annotated[str, typer.Argument(help="name of the site")],
    days: Annotated[float, typer.Option("--days", help="until the code expires; at most 90")] = 7.0,
    again: Annotated[
        bool, typer.Option("--again", help="an enrolled or revoked site joins anew, with a new key")
    ] = False,
    home: Home = DEFAULT_COORDINATOR_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Register a site, and print the code that it joins with, once."""
    registry, settings = _registry(home), CoordinatorHome(home).settings()
    code = str(registry.invite(site, days, again=again))
    address = join_address(settings.host, settings.port)
    expires = registry.site(site).expires_at
    if as_json:
        fields = {"site": site, "code": code, "server": address, "expires": expires.isoformat()}
        typer.echo(json.dumps(fields))
        return
    typer.echo(f"{site} may join until {expires:%Y-%m-%d %H:%M} UTC, once. At the site:")
    extra = " --again" if again else ""
    typer.echo(f"  fedtune client join {code} --server {address}{extra}")


@server.command("revoke")
def revoke(
    site: Annotated[str, typer.Argument(help="name of the site")],
    home: Home = DEFAULT_COORDINATOR_HOME,
) -> None:
    """Take all rights from a site, at once; it is told at its next request."""
    _registry(home).revoke(site)
    typer.echo(
        f"revoked {site}: its key, token and join code are void; to let it back in: "
        f"fedtune server invite {site} --again{_dir_option(home)}"
    )


@server.command("sites")
def sites(
    home: Home = DEFAULT_COORDINATOR_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per site")] = False,
) -> None:
    """List the sites that the coordinator knows."""
    known = sorted(_registry(home).sites().values(), key=lambda site: site.name)
    if as_json:
        for site in known:
            typer.echo(json.dumps(_site_fields(site)))
        return
    if not known:
        typer.echo(f"no sites yet; invite one: fedtune server invite SITE{_dir_option(home)}")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("site", "state", "since", "code expires"):
        table.add_column(title)
    for site in known:
        fields = _site_fields(site)
        open_code = fields["code_expires"] if fields["code_open"] else ""
        table.add_row(*(_minute(text) for text in (site.name, site.state, fields["since"])),
                      _minute(open_code))  # fmt: skip
    Console().print(table)


@server.command("rotate")
def rotate(
    token: Annotated[
        bool, typer.Option("--token", help="a new operator token instead of a new certificate")
    ] = False,
    authority: Annotated[
        bool, typer.Option("--ca", help="a new authority and all that hangs on it: sites join anew")
    ] = False,
    home: Home = DEFAULT_COORDINATOR_HOME,
) -> None:
    """Give the coordinator a new certificate, operator token, or certificate authority."""
    coordinator = CoordinatorHome(home)
    again = f"restart the coordinator: fedtune server start{_home_argument(home)}"
    if authority:
        kept = rotate_authority(coordinator)
        typer.echo(f"made a new authority, certificate and operator token; the old ones: {kept}")
        typer.echo(f"copy {coordinator.operator_file} to operators anew, and {again}")
        typer.echo("sites pin the old authority; for each: fedtune server invite SITE --again")
        return
    if not token:
        days = rotate_certificate(coordinator)
        typer.echo(f"made a new certificate for {days:.0f} days; sites see no difference")
        typer.echo("a coordinator that runs takes it for new connections within a minute")
        return
    rotate_token(coordinator)
    typer.echo(f"made a new operator token in {coordinator.operator_file}; copy it to operators")
    typer.echo(f"{again}; runs go on where they were")


def _registry(home: Path) -> Any:  # a Registry; the command line does not import the server
    CoordinatorHome(home).settings()  # says how to make a home where there is none
    return load_app("registry")(CoordinatorHome(home).registry)


def _site_fields(site: Any) -> dict[str, Any]:
    """What may be shown of a site: no digest of a secret."""
    since = {
        "invited": site.invited_at,
        "enrolled": site.enrolled_at,
        "revoked": site.revoked_at,
    }[site.state]
    return {
        "site": site.name,
        "state": site.state,
        "since": since.isoformat() if since else "",
        "node_id": site.node_id,
        "code_open": not site.code_used,
        "code_expires": site.expires_at.isoformat(),
    }


def _minute(text: str) -> str:
    """A time to the minute; other texts as they are."""
    return text[:16].replace("T", " ") if text[10:11] == "T" else text


def _dir_option(home: Path) -> str:
    return "" if home == DEFAULT_COORDINATOR_HOME else f" --dir {shlex.quote(str(home))}"


def _home_argument(home: Path) -> str:
    return "" if home == DEFAULT_COORDINATOR_HOME else f" {shlex.quote(str(home))}"
