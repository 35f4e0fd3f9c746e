"""What a run's ledger says, gathered for the report.

A ledger is JSON lines, each with a `kind` and the fields of that event. A run that was continued
tells some things twice; the later telling counts. A run that was killed may end in half a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.errors import RunError

Line: TypeAlias = Mapping[str, Any]
"""One event: its fields are JSON values of many types."""

_ENDINGS = {
    "run_started": "not finished",
    "run_finished": "finished",
    "run_interrupted": "interrupted",
    "run_failed": "failed",
}


@dataclass(slots=True)
class LedgerFacts:
    """The events of a run by what they are about.

    Attributes:
        status: of `finished`, `not finished`, `interrupted`, `failed`.
        ending: the event that gave the status.
        importance: the `importance_found`: what the ranks follow.
        plans: one entry per device, of the last plan.
        rounds: round -> its `round_finished`.
        reports: (round, device) -> its `device_reported`.
        refusals: (round, device) -> reason.
        evaluations: round -> its `evaluated`.
        replans: (round, device) -> its `replanned`.
        cosines: (round, device) -> cosine of its update with the joined one.
        tested: base and merged model on the run's test file.
    """

    started: Line = field(default_factory=dict)
    status: str = "not finished"
    ending: Line = field(default_factory=dict)
    sites: dict[str, Line] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    importance: Line = field(default_factory=dict)
    plans: list[Line] = field(default_factory=list)
    leaves: list[Line] = field(default_factory=list)
    rounds: dict[int, Line] = field(default_factory=dict)
    reports: dict[tuple[int, str], Line] = field(default_factory=dict)
    refusals: dict[tuple[int, str], str] = field(default_factory=dict)
    evaluations: dict[int, Line] = field(default_factory=dict)
    replans: dict[tuple[int, str], Line] = field(default_factory=dict)
    cosines: dict[tuple[int, str], float] = field(default_factory=dict)
    tested: Line = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        """Names of all devices that planned or reported, planned ones first."""
        names = [str(plan.get("device", "")) for plan in self.plans]
        names += [device for _, device in sorted(self.reports)]
        return list(dict.fromkeys(names))

    def plan_of(self, device: str) -> Line:
        """The plan of a device; empty when there is none."""
        return next((plan for plan in self.plans if plan.get("device") == device), {})

    def held_out(self) -> list[tuple[int, float]]:
        """Held-out loss after 0, 1, ... rounds, where it was measured.

        A round measures the adapter that it starts from, which is that of the round before.
        """
        points = {r - 1: number(line, "held_out_loss") for r, line in self.rounds.items()}
        points |= {r: number(line, "held_out_loss") for r, line in self.evaluations.items()}
        return sorted((r, loss) for r, loss in points.items() if loss is not None)

    def held_out_of(self, device: str) -> list[tuple[int, float]]:
        """Held-out loss of one device after 0, 1, ... rounds, where it was measured."""
        points = {
            r - 1: number(line, "loss_before")
            for (r, name), line in self.reports.items()
            if name == device
        }
        for r, line in self.evaluations.items():
            points[r] = number(line.get("devices") or {}, device)
        return sorted((r, loss) for r, loss in points.items() if loss is not None)

    def train_of(self, device: str) -> list[tuple[int, float]]:
        """Training loss of one device in each round that it reported."""
        points = (
            (r, number(line, "train_loss"))
            for (r, name), line in self.reports.items()
            if name == device
        )
        return sorted((r, loss) for r, loss in points if loss is not None)

    def values_of(self, device: str, key: str) -> list[float]:
        """A number of a device's reports, where it was reported."""
        found = (number(line, key) for (_, name), line in self.reports.items() if name == device)
        return [value for value in found if value is not None]

    def loss_change(self) -> tuple[float | None, float | None]:
        """Held-out loss before and after training, as far as it is known."""
        curve = self.held_out()
        before = number(self.ending, "held_out_loss_before")
        after = number(self.ending, "held_out_loss_after")
        if before is None and curve:
            before = curve[0][1]
        if after is None and len(curve) > 1:
            after = curve[-1][1]
        return before, after


def number(line: Line, key: str) -> float | None:
    """A finite number of an event, or None."""
    value = line.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_ledger(path: Path) -> LedgerFacts:
    """Read a run's ledger.

    Raises:
        RunError: the file is missing, or a line other than the last is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}; name the folder of a run") from None
    return gather(_parse(path, lines))


def _parse(path: Path, lines: Sequence[str]) -> list[Line]:
    events: list[Line] = []
    for index, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            event = json.loads(text)
        except json.JSONDecodeError as error:
            if index == len(lines):
                continue  # a killed run leaves half a line
            raise RunError(f"line {index} of {path} is not JSON: {error}") from None
        if not isinstance(event, dict):
            raise RunError(f"line {index} of {path} is not a JSON object: {text[:60]}")
        events.append(event)
    return events


def gather(events: Sequence[Line]) -> LedgerFacts:
    """Sort events by what they are about; unknown kinds are left out."""
    facts = LedgerFacts()
    finished: Line = {}
    for event in events:
        kind = str(event.get("kind", ""))
        if kind in ("run_finished", "round_started"):
            finished = event if kind == "run_finished" else {}
        if kind in _ENDINGS:
            facts.status, facts.ending = _ENDINGS[kind], event
        if kind == "run_started":
            facts.started = event
        elif kind == "run_resumed":
            _go_on(facts, event, finished)
        elif kind == "warning":
            text = str(event.get("text", ""))
            if text not in facts.warnings:  # each start of a run says what its data lack
                facts.warnings.append(text)
        elif kind == "tested":
            facts.tested = event
        elif kind == "exported":
            facts.paths |= event.get("paths") or {}
            facts.skipped = dict(event.get("skipped") or {})
        else:
            _gather_fleet(facts, kind, event)
            _gather_round(facts, kind, event)
    return facts


def _go_on(facts: LedgerFacts, resumed: Line, finished: Line) -> None:
    """Leave out what was told of rounds that are played again from here.

    Args:
        finished: the `run_finished` after the last round, if there is one.
    """
    joined = int(number(resumed, "round") or 0)
    exports_alone = bool(finished) and joined >= (number(resumed, "rounds") or 0)
    facts.status = "finished" if exports_alone else "not finished"
    facts.ending = finished if exports_alone else resumed
    facts.rounds = {r: line for r, line in facts.rounds.items() if r <= joined}
    facts.evaluations = {r: line for r, line in facts.evaluations.items() if r <= joined}
    facts.reports = {key: line for key, line in facts.reports.items() if key[0] <= joined}
    facts.refusals = {key: line for key, line in facts.refusals.items() if key[0] <= joined}
    facts.replans = {key: line for key, line in facts.replans.items() if key[0] <= joined}
    facts.cosines = {key: each for key, each in facts.cosines.items() if key[0] <= joined}


def _gather_fleet(facts: LedgerFacts, kind: str, event: Line) -> None:
    device = str(event.get("device", ""))
    if kind == "site_reported":
        facts.sites[device] = event
    elif kind == "site_excluded":
        facts.excluded[device] = str(event.get("reason", ""))
    elif kind == "planned":
        facts.plans = list(event.get("devices") or [])
    elif kind == "importance_found":
        facts.importance = event
    elif kind == "leaves_device" and event.get("stage") != "calibration":
        facts.leaves = list(event.get("tensors") or [])


def _gather_round(facts: LedgerFacts, kind: str, event: Line) -> None:
    if "round" not in event:
        return
    round_number, device = int(event["round"]), str(event.get("device", ""))
    if kind == "round_finished":
        facts.rounds[round_number] = event
    elif kind == "device_reported":
        facts.reports[round_number, device] = event
    elif kind == "device_refused":
        facts.refusals[round_number, device] = str(event.get("reason", ""))
    elif kind == "replanned":
        facts.replans[round_number, device] = event
    elif kind == "evaluated":
        facts.evaluations[round_number] = event
    elif kind == "updates_compared":
        facts.cosines |= dict(_cosines(round_number, event))


def _cosines(round: int, event: Line) -> Iterator[tuple[tuple[int, str], float]]:
    for entry in event.get("devices") or ():
        cosine = number(entry, "cosine") if isinstance(entry, Mapping) else None
        if cosine is not None:
            yield (round, str(entry.get("device", ""))), cosine
