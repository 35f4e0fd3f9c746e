"""`fedtune logs SITE`: what a site's processes say, where its policy lets them."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedtune.cli.amounts import one_line
from fedtune.cli.coordinator import CoordinatorFile, Insecure, coordinator
from fedtune.deploy.channel import spoken_errors
from fedtune.v1 import coordinator_pb2 as pb


def logs(
    site: Annotated[str, typer.Argument(help="the site's name")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with new lines")] = False,
    lines: Annotated[int, typer.Option("-n", min=1, max=10_000, help="lines of before")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="print the lines as they came")] = False,
    coordinator_file: CoordinatorFile = None,
    insecure: Insecure = False,
) -> None:
    """Show a site's log, as far as it shares it (share_logs in its policy.toml)."""
    request = pb.SiteLogsRequest(site=site, tail=lines, follow=follow)
    any_came = False
    with coordinator(coordinator_file, insecure) as at, spoken_errors(at.service):
        for line in at.stub.SiteLogs(request, timeout=None if follow else 60.0):
            any_came = True
            typer.echo(line.json if as_json else log_text(line.json))
    if not any_came:
        typer.echo(
            f"no lines of {one_line(site)} came: a site sends them while it runs with "
            "share_logs = true in its policy.toml; otherwise they are in logs/ of its own folder",
            err=True,
        )


def log_text(line: str) -> str:
    """A structured log line for a person; the site's words come without control characters."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return one_line(line, 2000)
    time = str(fields.get("time") or "")[:19].replace("T", " ")
    level = str(fields.get("level") or "")
    parts = [
        time,
        level if level.lower() != "info" else "",
        fields.get("process"),
        fields.get("message"),
    ]
    return one_line(" ".join(str(part) for part in parts if part), 2000)
