"""Runs of a coordinator as a person sees them, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli.amounts import bytes_text, one_line
from fedtune.v1 import coordinator_pb2 as pb

_LOG_WIDTH = 120
"""Characters of a line where there is no terminal that has a width."""
_STYLES = {
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "stopped": "yellow",
    "stopping": "yellow",
}


def run_object(run: pb.RunInfo) -> dict[str, object]:
    """A run in JSON's types."""
    return {
        "name": run.name,
        "run": run.run,
        "state": run.state,
        "round": run.round,
        "rounds": run.rounds,
        "sites": list(run.devices),
        "since": run.since,
        "updated": run.updated,
        "restarts": run.restarts,
        "reason": run.reason,
        "bytes_sent": run.bytes_sent,
        "bytes_received": run.bytes_received,
    }


def print_runs(runs: Sequence[pb.RunInfo]) -> None:
    """Print a row for each run, and below them why runs wait, failed or were stopped."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_LOG_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("round", "sites", "sent", "received"):
        table.add_column(name, justify="right")
    table.add_column("asked for", no_wrap=True)
    for run in runs:
        state = one_line(run.state, 20)
        table.add_row(
            Text(one_line(run.name)),
            Text(state, style=_STYLES.get(state, "")),
            f"{run.round}/{run.rounds}",
            str(len(run.devices) or "-"),
            bytes_text(run.bytes_sent),
            bytes_text(run.bytes_received),
            Text(one_line(run.since[:16]).replace("T", " ")),
        )
    console.print(table)
    for run in runs:
        if run.reason:
            console.print(
                Text(f"{one_line(run.name)}: {one_line(run.reason, 1000)}"), soft_wrap=True
            )


def run_lines(run: pb.RunInfo) -> list[str]:
    """One run in a few lines."""
    found = [f"run {one_line(run.name)} {one_line(run.state)}, round {run.round} of {run.rounds}"]
    sites = ", ".join(one_line(name) for name in run.devices)
    found.append(f"sites      {sites or 'not known yet'}")
    found.append(
        f"link       {bytes_text(run.bytes_sent)} sent, {bytes_text(run.bytes_received)} received"
    )
    found.append(f"asked for  {one_line(run.since)}, last word {one_line(run.updated)}")
    if run.restarts:
        found.append(f"restarts   {run.restarts} of the coordinator's process for it")
    if run.reason:
        found.append(f"reason     {one_line(run.reason, 1000)}")
    return found


def site_object(site: pb.SiteInfo) -> dict[str, object]:
    """A site of a run in JSON's types."""
    status = site.status
    return {
        "name": site.name,
        "registered": site.state,
        "online": site.online,
        "last_seen": site.last_seen,
        "state": status.state,
        "run": status.run,
        "round": status.round,
        "last_refusal": status.last_refusal,
    }


def site_line(site: pb.SiteInfo) -> str:
    """A site of a run in one line: whether it is there, what it does, what it last refused."""
    seen = (
        f", last seen {one_line(site.last_seen[:16]).replace('T', ' ')}" if site.last_seen else ""
    )
    if site.state != "enrolled":
        words = one_line(site.state, 20)
    elif not site.online:
        words = f"offline{seen}"
    else:
        words = one_line(site.status.state, 40) or "online"
    refused = one_line(site.status.last_refusal, 500)
    return f"  {one_line(site.name)}: {words}" + (f"; last refusal: {refused}" if refused else "")
