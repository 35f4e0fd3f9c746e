"""What of a deployment deserves a person's attention now, beside the alarms of a run's events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune_server.dashboard.readings import Reading
from fedtune_server.desk.view import RunEntry, SiteEntry

CERTIFICATE_DAYS = 30.0
"""A certificate that ends sooner is an alarm; a month is time for a change window."""
RESTARTS = 3
"""Restarts of one run that are a crash loop, and not an accident."""

_MOST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Attention:
    """One cause.

    Attributes:
        name: as in docs/watch.md, or `certificate`, `offline`, `crashes`, `failed`, `ledger`.
        time: when it was written, or a site was last seen, UTC, ISO 8601; empty: it holds now.
    """

    name: str
    text: str
    time: str = ""


def attention(
    runs: Sequence[RunEntry],
    sites: Sequence[SiteEntry],
    reading: Reading,
    certificate_days: float | None,
    processes: Mapping[str, str],
) -> tuple[Attention, ...]:
    """Everything that deserves attention; what holds now comes first.

    Args:
        reading: of the run that is shown.
        certificate_days: until the server's certificate ends; None: not known.
        processes: those of the coordinator that a person must look at, and why.
    """
    found = [
        *_of_certificate(certificate_days),
        *_of_processes(processes),
        *_of_runs(runs),
        *_of_sites(runs, sites),
    ]
    if reading.error:
        found.append(Attention("ledger", reading.error))
    for each in reading.alarms:
        time = each.time.isoformat(timespec="seconds") if each.time else ""
        found.append(Attention(each.alarm.name, each.alarm.text, time))
    return tuple(found)


def _of_certificate(days: float | None) -> Iterator[Attention]:
    if days is not None and days <= 0:
        text = "the server's certificate has ended: sites cannot connect; renew it with: "
        yield Attention("certificate", text + "fedtune server rotate")
    elif days is not None and days < CERTIFICATE_DAYS:
        text = f"the server's certificate ends in {days:.0f} days; renew it with: "
        yield Attention("certificate", text + "fedtune server rotate")


def _of_processes(processes: Mapping[str, str]) -> Iterator[Attention]:
    for name, why in processes.items():
        yield Attention("crashes", f"the process {name} {why}")


def _of_runs(runs: Sequence[RunEntry]) -> Iterator[Attention]:
    for run in runs:
        if run.state == "running" and run.restarts >= RESTARTS:
            why = f": {run.reason}" if run.reason else ""
            yield Attention(
                "crashes", f"run {run.name} was started again {run.restarts} times{why}"
            )
        elif run.state == "failed":
            yield Attention("failed", f"run {run.name} failed: {run.reason or 'no reason given'}")


def _of_sites(runs: Sequence[RunEntry], sites: Sequence[SiteEntry]) -> Iterator[Attention]:
    wanted = {name: run.name for run in runs if run.state == "running" for name in run.devices}
    for site in sites:
        if site.state == "enrolled" and not site.online and site.name in wanted:
            text = f"site {site.name} takes part in run {wanted[site.name]} and is offline"
            seen = "; last seen" if site.last_seen else "; it was not seen since this start"
            yield Attention("offline", text + seen, site.last_seen)


def troubled_processes(path: Path) -> dict[str, str]:
    """Processes of the coordinator that a person must look at, and why; by the supervisor's file.

    Args:
        path: `logs/supervisor.json` of the coordinator's home; nothing is known where it is not.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    children = _mapping(_mapping(tree).get("children"))
    return {str(name): why for name, child in children.items() if (why := _trouble(child))}


def _trouble(child: object) -> str:
    told = _mapping(child)
    if told.get("crash_loop") is True:
        return f"is in a crash loop ({told.get('restarts')} restarts): {told.get('last_error')}"
    if told.get("state") == "refused":
        return f"does not go on, and a restart would not help: {told.get('last_error')}"
    return ""


def _mapping(value: object) -> Mapping[str, Any]:  # JSON values of many types
    return value if isinstance(value, dict) else {}
