"""Where a run stands, from its folder alone: it may be going on, over, or killed.

Nothing is asked of the coordinator and nothing is written. Events that this version does not know
change nothing, so a folder of a later version can be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedtune.export.device_view import DeviceView, device_views
from fedtune.export.ledger_facts import LedgerFacts, Line, gather, number
from fedtune.export.ledger_tail import LedgerTail, line_time
from fedtune.export.run_place import coordinator_at_work
from fedtune.export.run_settings import json_object, planned_rounds

RunState = Literal["starting", "running", "finished", "interrupted", "failed", "stopped"]

_ROUNDS_FOR_PACE = 5
_AGAIN = "run the same command again to continue"
_STATES: Mapping[str, RunState] = {
    "run_started": "running",
    "run_resumed": "running",
    "round_started": "running",
    "run_finished": "running",  # the exports follow
    "exported": "finished",
    "run_interrupted": "interrupted",
    "run_failed": "failed",
}
"""The state of a run after an event; others leave it as it is."""


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at a moment. Bytes are bytes, times are seconds or UTC in ISO 8601.

    Attributes:
        state: `stopped`: the ledger goes on, and no coordinator is at work.
        advice: what to do, if anything.
        round: last round that was joined; 0 before the first.
        phase: what went on last, as the kind of the last event.
        idle_seconds: since the last event.
        held_out: (rounds that the adapter had seen, held-out loss), in their order.
        best_round: rounds that the best adapter had seen.
        seconds_per_round: mean of the last five.
        dropped_energy: share that the rank cap cut off in the last round, worst matrix.
        dropped_energy_most: the largest of all rounds.
        refused: updates, over all rounds.
        excluded: device that cannot take part -> reason.
        cosines: of each device's last compared update with the joined one: lowest, mean, highest.
    """

    run: str
    folder: str
    state: RunState
    advice: str
    round: int
    rounds: int
    started: str | None
    phase: str
    last_event: str | None
    idle_seconds: float | None
    held_out: tuple[tuple[int, float], ...]
    held_out_first: float | None
    held_out_last: float | None
    held_out_best: float | None
    best_round: int | None
    accuracy: float | None
    seconds_per_round: float | None
    seconds_left: float | None
    download_bytes: float
    upload_bytes: float
    dropped_energy: float | None
    dropped_energy_most: float | None
    refused: int
    cosines: tuple[float, float, float] | None
    devices: tuple[DeviceView, ...]
    excluded: Mapping[str, str]
    warnings: int
    last_warning: str
    paths: Mapping[str, str]


def view_run(folder: Path, now: datetime | None = None) -> RunView:
    """Where the run in a folder stands.

    Args:
        now: default: the clock's.

    Raises:
        RunError: the ledger cannot be read, or a whole line of it is not a JSON object.
    """
    lines = LedgerTail(folder / "ledger.jsonl").read().lines
    facts, now = gather(lines), now or datetime.now(UTC)
    state, advice = _state(folder, facts, lines)
    curve = tuple((r, loss) for r, loss in facts.held_out() if r >= 0)
    best = min(curve, key=lambda point: point[1], default=None)
    pace, last = _pace(facts), max(facts.rounds, default=0)
    # A continued run may have been given more rounds than it began with.
    rounds = planned_rounds(folder) or int(number(facts.started, "rounds") or 0)
    devices = device_views(facts, lines)
    cosines = [each.cosine for each in devices if each.cosine is not None]
    dropped = [number(facts.rounds[r], "dropped_energy") for r in sorted(facts.rounds)]
    known = [share for share in dropped if share is not None]
    evaluation = facts.evaluations[max(facts.evaluations)] if facts.evaluations else {}
    last_time = line_time(lines[-1]) if lines else None
    return RunView(
        run=str(facts.started.get("run", folder.name)),
        folder=str(folder),
        state=state,
        advice=advice,
        round=last,
        rounds=rounds,
        started=str(facts.started["time"]) if facts.started.get("time") else None,
        phase=str(lines[-1].get("kind", "")) if lines else "",
        last_event=last_time.isoformat(timespec="seconds") if last_time else None,
        idle_seconds=max((now - last_time).total_seconds(), 0.0) if last_time else None,
        held_out=curve,
        held_out_first=curve[0][1] if curve else None,
        held_out_last=curve[-1][1] if curve else None,
        held_out_best=best[1] if best else None,
        best_round=best[0] if best else None,
        accuracy=number(evaluation, "accuracy"),
        seconds_per_round=pace,
        seconds_left=(rounds - last) * pace if pace and state == "running" else None,
        download_bytes=_total(facts, "download_bytes"),
        upload_bytes=_total(facts, "upload_bytes"),
        dropped_energy=known[-1] if known else None,
        dropped_energy_most=max(known, default=None),
        refused=sum(line.get("kind") == "device_refused" for line in lines),
        cosines=(min(cosines), math.fsum(cosines) / len(cosines), max(cosines))
        if cosines
        else None,
        devices=devices,
        excluded=dict(facts.excluded),
        warnings=len(facts.warnings),
        last_warning=facts.warnings[-1] if facts.warnings else "",
        paths=dict(facts.paths),
    )


def run_state(lines: Sequence[Line]) -> RunState:
    """The state that the events of a run tell, whether or not a coordinator is at work."""
    told = (_STATES.get(str(line.get("kind"))) for line in reversed(lines))
    return next((state for state in told if state), "starting")


def _state(folder: Path, facts: LedgerFacts, lines: Sequence[Line]) -> tuple[RunState, str]:
    """The state, and what to do about it."""
    state = run_state(lines)
    if state == "finished":
        return state, ""
    if state in ("interrupted", "failed"):
        reason = str(facts.ending.get("reason", "")) if state == "failed" else ""
        return state, f"{reason}; {_AGAIN}" if reason else _AGAIN
    if not lines:
        told = json_object(folder / "status.json").get("state")
        if told in ("interrupted", "failed"):
            return ("failed" if told == "failed" else "interrupted"), _AGAIN
    at_work = coordinator_at_work(folder)
    if at_work is False:
        return "stopped", f"it stopped without a word; {_AGAIN}"
    if at_work is None:
        return state, "whether a coordinator is at work cannot be told here"
    return state, ""


def _pace(facts: LedgerFacts) -> float | None:
    seconds = [number(facts.rounds[r], "seconds") for r in sorted(facts.rounds)]
    known = [each for each in seconds if each is not None][-_ROUNDS_FOR_PACE:]
    return math.fsum(known) / len(known) if known else None


def _total(facts: LedgerFacts, key: str) -> float:
    return math.fsum(number(line, key) or 0.0 for line in facts.rounds.values())
