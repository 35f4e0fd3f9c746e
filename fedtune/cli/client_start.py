"""`fedtune client start`: run a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.apps import load_app
from fedtune.cli.log_view import log_view


def start(
    home: Annotated[Path, typer.Argument(help="the site's folder")] = Path("fedtune-site"),
    insecure: Annotated[
        bool, typer.Option("--insecure", help="without TLS: for tests on one machine")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="print one JSON object per log record")
    ] = False,
) -> int:
    """Run a site until Ctrl-C or SIGTERM; its processes are restarted when they end.

    Health and metrics are at http://127.0.0.1:HEALTH_PORT/health and /metrics.
    """
    started: int = load_app("client_start")(home, insecure=insecure, view=log_view(json_lines))
    return started
