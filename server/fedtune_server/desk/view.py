"""What the desk knows, as records to look at: runs, sites, events and refusals.

The gRPC services and the dashboard read the same records. Times are UTC in ISO 8601, quantities
are in the unit of their name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

RunState = Literal["queued", "running", "stopping", "stopped", "finished", "failed"]
SiteState = Literal["invited", "enrolled", "revoked"]


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A run that somebody asked for.

    Attributes:
        name: `run.name` of its run file; its folder is HOME/runs/NAME.
        run: its id in its ledger; empty before it has one.
        round: last round that was joined and saved.
        since: when it was asked for.
        updated: when its state was last written.
        restarts: times that its process was started again.
        reason: why it failed, stopped or waits; empty otherwise.
        devices: sites that take part, once they are known.
        bytes_sent, bytes_received: over Flower's link, as Flower counts them.
    """

    name: str
    run: str
    state: RunState
    round: int
    rounds: int
    since: str
    updated: str
    restarts: int
    reason: str
    devices: tuple[str, ...]
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What a site last told of itself; texts are clipped and hold no control characters.

    Attributes:
        state: idle, waiting, training, evaluating, downloading, refusing.
        run: name of the run that it works for; empty: none.
        step, steps: optimiser steps of this round, done and planned.
        memory_bytes: of its training process now.
        link_down_bytes_per_s: measured; 0: not yet.
        last_refusal: why it last refused work; empty: never.
        device: what kind of machine, in words.
    """

    state: str = ""
    run: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    memory_bytes: int = 0
    memory_allowed_bytes: int = 0
    bytes_down_today: int = 0
    bytes_up_today: int = 0
    link_down_bytes_per_s: float = 0.0
    link_up_bytes_per_s: float = 0.0
    last_refusal: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""


@dataclass(frozen=True, slots=True)
class SiteEntry:
    """A site of the registry, and what is known of it now.

    Attributes:
        online: whether it told of itself in the last 30 s.
        last_seen: when it last did; empty: never since the desk started.
        report: the last that it told; None: nothing yet.
    """

    name: str
    state: SiteState
    online: bool
    last_seen: str
    report: SiteReport | None = None


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One line of a run's ledger.

    Attributes:
        line: counted from 1.
        json: the line, without its line break.
    """

    line: int
    json: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Work that a site would not do, or a call that the desk refused.

    Attributes:
        who: name of a site, or the address of somebody unknown.
        what: `work` or `call`.
    """

    time: str
    who: str
    what: Literal["work", "call"]
    reason: str


class DeskView(Protocol):
    """What may be looked at; safe to call from any thread, and nothing changes by it."""

    def runs(self) -> Sequence[RunEntry]:
        """Every run, the newest first."""
        ...

    def sites(self) -> Sequence[SiteEntry]:
        """Every site of the registry, by name."""
        ...

    def folder(self, name: str) -> Path:
        """The folder of a run, which need not be there yet.

        Raises:
            RunError: no run has that name.
        """
        ...

    def events(self, name: str, after: int = 0) -> Iterator[LedgerLine]:
        """The ledger's whole lines behind line `after` that are there now; it does not wait.

        Raises:
            RunError: no run has that name.
        """
        ...

    def refusals(self) -> Sequence[Refusal]:
        """The last few hundred refusals, the newest first."""
        ...
