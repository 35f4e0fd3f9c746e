"""What the page shows, as a flat mapping of parts; a part is what changes together.

Parts are plain JSON. Quantities are texts, as a person reads them; what a picture needs as numbers
is there as numbers. Nothing in a part depends on the time of day, so that a part that did not
change is not sent again: the page itself tells how long ago something was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from fedtune.export.charts import ticks
from fedtune.export.device_view import DeviceView, plans_in_force
from fedtune.export.ledger_facts import LedgerFacts, Line, number
from fedtune.export.ledger_tail import fields_of
from fedtune.export.quantities import UNKNOWN, bytes_text, number_text, seconds_text
from fedtune_server.dashboard.attention import Attention
from fedtune_server.dashboard.readings import Reading
from fedtune_server.dashboard.timeline import current_round
from fedtune_server.desk.view import Refusal, RunEntry, SiteEntry, SiteReport

Part = Mapping[str, object]

_ROUNDS_FOR_PACE = 5
_POINTS = 400
"""More points than this are thinned out: a screen does not show them."""
_REFUSALS, _LINES, _RUNS = 50, 30, 50
_CLIP = 300


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a page is made of: the desk's records and the ledger of the run that is shown."""

    runs: Sequence[RunEntry]
    sites: Sequence[SiteEntry]
    refusals: Sequence[Refusal]
    shown: RunEntry | None
    reading: Reading
    attention: Sequence[Attention]


def chosen_run(runs: Sequence[RunEntry], wanted: str) -> RunEntry | None:
    """The run that is asked for; else one that runs; else the newest."""
    by_name = {run.name: run for run in runs}
    running = [run for run in runs if run.state in ("running", "stopping")]
    return by_name.get(wanted) or next(iter([*running, *runs]), None)


def parts(deployment: Deployment) -> dict[str, Part]:
    """Everything that the page shows; `site/NAME` is a row of the fleet table."""
    facts = deployment.reading.facts or LedgerFacts()
    lines = deployment.reading.lines
    rows = _fleet(deployment, facts)
    return {
        "head": _head(deployment.shown, facts),
        "runs": {"runs": [_run(run) for run in deployment.runs[:_RUNS]]},
        "alarms": {"alarms": [asdict(each) for each in deployment.attention]},
        "fleet": {"order": list(rows)},
        **{f"site/{name}": row for name, row in rows.items()},
        "loss": _loss(facts),
        "round": _round(lines, facts),
        "refusals": {"refusals": _refusals(deployment.refusals, lines)},
        "privacy": _privacy(lines),
        "ledger": {"lines": [_ledger_line(line) for line in reversed(lines[-_LINES:])]},
    }


# ---------------------------------------------------------------- the run


def _head(run: RunEntry | None, facts: LedgerFacts) -> Part:
    if run is None:
        return {"name": ""}
    pace = seconds_per_round(facts)
    left = (run.rounds - run.round) * pace if pace and run.state == "running" else None
    before, after = facts.loss_change()
    return {
        "name": run.name,
        "run": run.run,
        "state": run.state,
        "round": run.round,
        "rounds": run.rounds,
        "since": run.since,
        "updated": run.updated,
        "restarts": run.restarts,
        "reason": run.reason,
        "pace": seconds_text(pace),
        "left": seconds_text(left),
        "loss_before": number_text(before),
        "loss_now": number_text(after),
        "sent": bytes_text(run.bytes_sent),
        "received": bytes_text(run.bytes_received),
    }


def seconds_per_round(facts: LedgerFacts) -> float | None:
    """Mean of the last rounds; None before the first."""
    last = sorted(facts.rounds)[-_ROUNDS_FOR_PACE:]
    known = [s for s in (number(facts.rounds[r], "seconds") for r in last) if s is not None]
    return math.fsum(known) / len(known) if known else None


def _run(run: RunEntry) -> Part:
    return {
        "name": run.name,
        "state": run.state,
        "round": run.round,
        "rounds": run.rounds,
        "sites": len(run.devices),
        "restarts": run.restarts,
        "updated": run.updated,
        "reason": run.reason,
        "sent": bytes_text(run.bytes_sent),
        "received": bytes_text(run.bytes_received),
    }


def _loss(facts: LedgerFacts) -> Part:
    held_out = [(r, loss) for r, loss in facts.held_out() if r >= 0]
    train = [
        (r, loss)
        for r in sorted(facts.rounds)
        if (loss := number(facts.rounds[r], "train_loss")) is not None
    ]
    points = [*held_out, *train]
    if not points:
        return {"held_out": [], "train": [], "x_ticks": [], "y_ticks": []}
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    whole = sorted({round(x) for x in ticks(low_x, high_x, 8)})
    return {
        "held_out": _thinned(held_out),
        "train": _thinned(train),
        "x_ticks": [x for x in whole if low_x <= x <= high_x],
        "y_ticks": ticks(min(y for _, y in points), max(y for _, y in points)),
    }


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most so many points, the last one always among them."""
    every = math.ceil(len(points) / _POINTS) or 1
    return list(points[::-1][::every][::-1])


def _round(lines: Sequence[Line], facts: LedgerFacts) -> Part:
    found = current_round(lines, facts)
    if found is None:
        return {"round": 0, "spans": []}
    return {
        "round": found.round,
        "started": found.started.isoformat(timespec="milliseconds"),
        "closed_s": found.closed_s,
        "attempt": found.attempt,
        "over": found.closed_s is not None or facts.status != "not finished",
        "last_s": max(
            [found.closed_s or 0.0, *(span.end_s or span.start_s for span in found.spans)]
        ),
        "spans": [{**asdict(span), "note": _clip(span.note)} for span in found.spans],
    }


# ---------------------------------------------------------------- the fleet


def _fleet(deployment: Deployment, facts: LedgerFacts) -> dict[str, Part]:
    """A row for every site of the registry and every device of the run."""
    sites = {site.name: site for site in deployment.sites}
    devices = {view.device: view for view in deployment.reading.devices}
    sums, plans = traffic(facts), plans_in_force(facts)
    found: dict[str, Part] = {}
    for name in dict.fromkeys((*sites, *devices)):
        plan, traffic_ = plans.get(name, {}), sums.get(name, (0.0, 0.0))
        found[name] = _row(name, sites.get(name), devices.get(name), plan, facts, traffic_)
    return found


def traffic(facts: LedgerFacts) -> dict[str, tuple[float, float]]:
    """Device -> bytes that it downloaded and uploaded in the rounds of a run."""
    sums: dict[str, tuple[float, float]] = {}
    for (_, name), report in facts.reports.items():
        down, up = sums.get(name, (0.0, 0.0))
        sums[name] = (
            down + (number(report, "download_bytes") or 0.0),
            up + (number(report, "upload_bytes") or 0.0),
        )
    return sums


def _row(
    name: str,
    site: SiteEntry | None,
    device: DeviceView | None,
    plan: Line,
    facts: LedgerFacts,
    sums: tuple[float, float],
) -> Part:
    told = (site.report if site else None) or SiteReport()
    online = site is not None and site.online
    predicted = number(plan, "peak_bytes")
    # What a site told before it went is no longer in use there.
    used = (told.memory_bytes if online else 0) or _measured_peak(facts, device)
    allowed = told.memory_allowed_bytes or number(plan, "budget_bytes")
    mark, state = _state(site, told)
    return {
        "site": name,
        "online": online,
        "mark": mark,
        "state": state,
        "device": told.device or UNKNOWN,
        "class": device.device_class if device else "",
        "plan": _plan_text(device, plan),
        "run": told.run,
        "round": told.round or (device.last_round if device else 0),
        "step": told.step,
        "steps": told.steps,
        "last_seen": site.last_seen if site else "",
        "down": bytes_text(sums[0]),
        "up": bytes_text(sums[1]),
        "down_today": bytes_text(told.bytes_down_today),
        "up_today": bytes_text(told.bytes_up_today),
        "used": bytes_text(used or None),
        "predicted": bytes_text(predicted),
        "allowed": bytes_text(allowed or None),
        "used_share": used / allowed if used and allowed else None,
        "predicted_share": predicted / allowed if predicted and allowed else None,
        "link_down": _speed(told.link_down_bytes_per_s),
        "link_up": _speed(told.link_up_bytes_per_s),
        "refusal": _clip(told.last_refusal) if state == "refusing" else "",
        "excluded": _clip(facts.excluded.get(name, "")),
    }


def _measured_peak(facts: LedgerFacts, device: DeviceView | None) -> float | None:
    """What an accelerator needed in its last round; other devices tell it as they work."""
    if device is None:
        return None
    return number(facts.reports.get((device.last_round, device.device), {}), "peak_bytes")


def _state(site: SiteEntry | None, told: SiteReport) -> tuple[str, str]:
    """A mark (`good`, `busy`, `bad`, `off`) and a word."""
    if site is None:
        return "off", "not in the registry"
    if site.state == "invited":
        return "off", "invited"
    if site.state == "revoked":
        return "bad", "revoked"
    if not site.online:
        return "bad", "offline"
    if told.state == "refusing":
        return "bad", "refusing"
    return ("busy" if told.state not in ("", "idle", "waiting") else "good"), told.state or "online"


def _plan_text(device: DeviceView | None, plan: Line) -> str:
    if device is None or not device.format:
        return UNKNOWN
    low, high = device.rank_min, device.rank_max
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    micro = number(plan, "micro_batch")
    return f"{device.format}, {ranks}" + (f", micro-batch {micro:g}" if micro else "")


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_text(bytes_per_s)}/s" if bytes_per_s > 0 else UNKNOWN


# ---------------------------------------------------------------- what was refused, spent, written


def _refusals(told: Sequence[Refusal], lines: Sequence[Line]) -> list[dict[str, str]]:
    """Refusals of sites, of calls and of updates, the newest first.

    What a site would not do is told by the site and, a moment later, by the run: once is enough.
    """
    kinds = ("device_refused", "calibration_refused", "site_excluded")
    of_run = [line for line in lines if line.get("kind") in kinds]
    known = {(str(line.get("device", "")), str(line.get("reason", ""))) for line in of_run}
    found = [
        {"time": each.time, "who": each.who, "what": each.what, "reason": _clip(each.reason)}
        for each in told
        if each.what != "work" or (each.who, each.reason) not in known
    ]
    for line in of_run:
        round_ = f", round {line['round']}" if "round" in line else ""
        found.append(
            {
                "time": str(line.get("time", "")),
                "who": str(line.get("device", "")),
                "what": {"device_refused": "update", "calibration_refused": "measurement"}.get(
                    str(line.get("kind")), "site"
                )
                + round_,
                "reason": _clip(str(line.get("reason", ""))),
            }
        )
    return sorted(found, key=lambda each: each["time"], reverse=True)[:_REFUSALS]


def _privacy(lines: Sequence[Line]) -> Part:
    """What was spent of a privacy budget, where events tell it."""
    spent: dict[str, Part] = {}
    for line in lines:
        epsilon = number(line, "epsilon")
        if epsilon is not None:
            delta, budget = number(line, "delta"), number(line, "epsilon_budget")
            spent[str(line.get("device") or "all devices")] = {
                "epsilon": f"{epsilon:.3g}",
                "delta": UNKNOWN if delta is None else f"{delta:.1e}",
                "budget": UNKNOWN if budget is None else f"{budget:.3g}",
            }
    return {"spent": [{"who": who, **part} for who, part in spent.items()]}


def _ledger_line(line: Line) -> dict[str, str]:
    fields = (f"{key} {value}" for key, value in _scalars(fields_of(line)))
    return {
        "time": str(line.get("time", "")),
        "kind": str(line.get("kind", "")),
        "text": _clip(", ".join(fields)),
    }


def _scalars(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if isinstance(value, int | float) and key.endswith("_bytes"):
            yield key.removesuffix("_bytes"), bytes_text(value)
        elif isinstance(value, int | float) and key.endswith("seconds"):
            yield key.removesuffix("_seconds"), seconds_text(value)
        elif isinstance(value, float):
            yield key, f"{value:.6g}"
        elif isinstance(value, str | int) and value != "":
            yield key, str(value)
        elif words := _words(value):
            yield key, " ".join(words)


def _words(value: object) -> list[str]:
    """A list of texts, or the texts of a mapping; nothing of other values."""
    inside = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(inside, list | tuple) and all(isinstance(each, str) for each in inside):
        return list(inside)
    return []


def _clip(text: str) -> str:
    return text if len(text) <= _CLIP else text[: _CLIP - 1] + "\N{HORIZONTAL ELLIPSIS}"
