"""The current round of a run as a time line: who was sent work when, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fedtune.export.device_view import plans_in_force
from fedtune.export.ledger_facts import LedgerFacts, Line, number
from fedtune.export.ledger_tail import line_time

Outcome = Literal["at work", "reported", "refused", "late", "joined late", "cut off"]


@dataclass(slots=True)
class Span:
    """One device in a round.

    Attributes:
        outcome: `late`: the round closed without it; `joined late`: its update was of an earlier
            round and counted in this one; `cut off`: the run ended before it did.
        start_s, end_s: seconds after the round began; no end: it is at work.
        planned_s: what its plan says that it takes.
        note: a reason, for refusals.
    """

    device: str
    outcome: Outcome
    start_s: float
    end_s: float | None = None
    planned_s: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class RoundLine:
    """A round.

    Attributes:
        closed_s: seconds after its begin at which it was joined; None: it goes on.
        attempt: 1, or more after repeats.
    """

    round: int
    started: datetime
    closed_s: float | None
    attempt: int
    spans: tuple[Span, ...]


def current_round(lines: Sequence[Line], facts: LedgerFacts) -> RoundLine | None:
    """The round that goes on, else the last one; None before the first."""
    first = _last_start(lines)
    started = line_time(lines[first]) if first is not None else None
    if first is None or started is None:
        return None
    planned = {name: number(plan, "seconds") for name, plan in plans_in_force(facts).items()}
    spans = {name: Span(name, "at work", 0.0) for name in _names(lines[first])}
    closed_s, attempt = None, 1
    for line in lines[first + 1 :]:
        time = line_time(line)
        at_s = max((time - started).total_seconds(), 0.0) if time else 0.0
        if line.get("kind") == "round_repeated":
            attempt = int(number(line, "attempt") or attempt + 1)
            spans |= {name: Span(name, "at work", at_s) for name in _names(line)}
        elif line.get("kind") == "round_finished":
            closed_s = at_s
        elif line.get("kind") in ("run_interrupted", "run_failed"):
            _cut_off(spans, at_s)
        elif line.get("device") is not None:
            _hear(spans, line, at_s)
    for span in spans.values():
        span.planned_s = planned.get(span.device)
    number_ = int(number(lines[first], "round") or 0)
    return RoundLine(number_, started, closed_s, attempt, tuple(spans.values()))


def _hear(spans: dict[str, Span], line: Line, at_s: float) -> None:
    kind, name = line.get("kind"), str(line["device"])
    if kind == "device_reported" and (number(line, "staleness") or 0) > 0:
        spans.setdefault(name, Span(name, "joined late", at_s, at_s))
    elif kind == "device_reported":
        _end(spans, name, "reported", at_s)
    elif kind == "device_refused":
        _end(spans, name, "refused", at_s, str(line.get("reason", "")))
    elif kind == "device_late":
        _end(spans, name, "late", at_s)


def _end(spans: dict[str, Span], name: str, outcome: Outcome, at_s: float, note: str = "") -> None:
    span = spans.setdefault(name, Span(name, outcome, 0.0))
    span.outcome, span.end_s, span.note = outcome, at_s, note


def _cut_off(spans: dict[str, Span], at_s: float) -> None:
    for span in spans.values():
        if span.end_s is None:
            span.outcome, span.end_s = "cut off", at_s


def _last_start(lines: Sequence[Line]) -> int | None:
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].get("kind") == "round_started":
            return index
    return None


def _names(line: Line) -> list[str]:
    devices = line.get("devices")
    return [str(name) for name in devices] if isinstance(devices, list | tuple) else []
