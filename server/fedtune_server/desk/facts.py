"""The desk's view of runs and sites, put together from its files, its streams and Flower."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from fedtune.errors import ConfigError, DeploymentError
from fedtune.settings import RunConfig
from fedtune_server.desk import telemetry
from fedtune_server.desk.credentials import SiteRegistry
from fedtune_server.desk.ledger_lines import LedgerLines
from fedtune_server.desk.player import Player, read_status
from fedtune_server.desk.presence import Presence
from fedtune_server.desk.queue import Queue, Wanted, read_config
from fedtune_server.desk.view import (
    LedgerLine,
    Refusal,
    RunEntry,
    RunState,
    SiteEntry,
    SiteState,
)


class Desk:
    """What may be looked at; see `DeskView`, whose methods these are."""

    def __init__(
        self, queue: Queue, runs: Path, player: Player, presence: Presence, registry: SiteRegistry
    ) -> None:
        self._queue, self._runs, self._player = queue, runs, player
        self._presence, self._registry = presence, registry
        self._devices: dict[str, _Devices] = {}
        self._lock = threading.Lock()

    def runs(self) -> Sequence[RunEntry]:
        """Every run, the newest first."""
        return [self._entry(run) for run in reversed(self._queue.all())]

    def run(self, name: str) -> RunEntry:
        """One run.

        Raises:
            RunError: no run has that name.
        """
        return self._entry(self._queue.need(name))

    def sites(self) -> Sequence[SiteEntry]:
        """Every site of the registry, by name."""
        found = []
        for name, site in sorted(self._registry.sites().items()):
            online, seen, report = self._presence.look(name)
            found.append(SiteEntry(name, _site_state(site.state), online, seen, report))
        return found

    def site_named(self, name: str) -> str:
        """The name of a site of the registry, which is fit for a file name.

        Raises:
            DeploymentError: the registry has no such site.
        """
        known = self._registry.sites()
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise DeploymentError(f"no site is called {name[:100]!r} here; known: {names}")
        return name

    def takes_part(self, site: str, name: str) -> bool:
        """Whether a site takes part in a run; False where there is no such run."""
        run = self._queue.get(name)
        config = _config(run.config_json) if run is not None else None
        return config is not None and not {site, "*"}.isdisjoint(config.deployment.sites)

    def folder(self, name: str) -> Path:
        """The folder of a run, which need not be there yet.

        Raises:
            RunError: no run has that name.
        """
        return self._runs / self._queue.need(name).name

    def events(self, name: str, after: int = 0) -> Iterator[LedgerLine]:
        """The ledger's whole lines behind line `after` that are there now.

        Raises:
            RunError: no run has that name.
        """
        lines = LedgerLines(self.folder(name) / "ledger.jsonl")
        return _behind(lines, after)

    def refusals(self) -> Sequence[Refusal]:
        """The last few hundred refusals, the newest first."""
        return self._presence.refusals()

    def count(self) -> None:
        """Set the gauges of the sites that there are now."""
        sites = self.sites()
        for name in ("invited", "enrolled", "revoked"):
            telemetry.SITES.labels(name).set(sum(site.state == name for site in sites))
        telemetry.SITES_ONLINE.set(sum(site.online for site in sites))

    # ------------------------------------------------------------ one run

    def _entry(self, run: Wanted) -> RunEntry:
        folder = self._runs / run.name
        status = read_status(folder)
        flower = self._player.flower.get(run.flower_run_id) if run.flower_run_id else None
        config = _config(run.config_json)
        reached = status.get("round")
        return RunEntry(
            name=run.name,
            run=str(status.get("run", "")),
            state=self._state(run),
            round=reached if isinstance(reached, int) and reached >= 0 else 0,
            rounds=config.run.rounds if config is not None else 0,
            since=run.since,
            updated=str(status.get("updated", "")) or run.since,
            restarts=run.restarts,
            reason=run.reason or self._waits(run),
            devices=self._devices_of(run, config),
            bytes_sent=flower.bytes_sent if flower is not None else 0,
            bytes_received=flower.bytes_received if flower is not None else 0,
        )

    def _state(self, run: Wanted) -> RunState:
        if run.ended:
            return run.ended
        if run.wanted == "stopped":
            return "stopping"
        return "queued" if run.flower_run_id is None else "running"

    def _waits(self, run: Wanted) -> str:
        """Why a run does not go on, where it should."""
        if run.ended or run.wanted == "stopped":
            return ""
        if self._player.trouble:
            return self._player.trouble
        ahead = [other.name for other in self._queue.all() if not other.ended]
        if run.flower_run_id is None and ahead and ahead[0] != run.name:
            return f"waits for {ahead[0]} to end; runs are played one after another"
        return ""

    def _devices_of(self, run: Wanted, config: RunConfig | None) -> tuple[str, ...]:
        named = config.deployment.sites if config is not None else ()
        if named and "*" not in named:
            return tuple(named)
        with self._lock:
            known = self._devices.setdefault(run.name, _Devices(self._runs / run.name))
            return known.names()


class _Devices:
    """Names of the devices that reported in a run's ledger, read on from where it was."""

    def __init__(self, folder: Path) -> None:
        self._lines = LedgerLines(folder / "ledger.jsonl")
        self._names: dict[str, None] = {}

    def names(self) -> tuple[str, ...]:
        while True:
            anew, lines = self._lines.read()
            if anew:
                self._names.clear()
            if not lines:
                return tuple(self._names)
            for line in lines:
                if '"site_reported"' in line.json:
                    self._take(line.json)

    def _take(self, text: str) -> None:
        try:
            event: Mapping[str, object] = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(event, dict) and event.get("kind") == "site_reported":
            self._names[str(event.get("device"))] = None


def _behind(lines: LedgerLines, after: int) -> Iterator[LedgerLine]:
    while True:
        _, found = lines.read()
        if not found:
            return
        yield from (line for line in found if line.line > after)


@lru_cache(maxsize=128)
def _config(config_json: str) -> RunConfig | None:
    try:
        return read_config(config_json)
    except ConfigError:
        return None  # of another version of fedtune; the run's name and state are still true


def _site_state(state: str) -> SiteState:
    if state == "enrolled":
        return "enrolled"
    return "revoked" if state == "revoked" else "invited"
