"""The plan in the report: a table of what each device does, and a picture of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedtune.export.charts import HeatRow, group_by_layer, heat_map, kind_of, strength
from fedtune.export.ledger_facts import LedgerFacts, Line, number
from fedtune.export.quantities import UNKNOWN, bytes_text, count_text, seconds_text
from fedtune.export.tables import details, table, track

_SHOWN_ROWS = 60
"""Devices in the picture; a larger fleet is cut and the table has them all."""


def plan_section(facts: LedgerFacts) -> str:
    """Plan table, heat map of ranks, and predictions beside measurements."""
    if not facts.plans:
        return ""
    return (
        f"<h2>Plan</h2>{_importance(facts.importance)}{_plan_table(facts)}"
        f"{_picture(facts.plans)}{_rank_table(facts.plans)}"
    )


def _importance(found: Line) -> str:
    """What the ranks follow, and the matrices in which they gain most."""
    if not found:
        return ""
    source = str(found.get("source", UNKNOWN))
    words = {
        "measured": f"measured on {count_text(number(found, 'tokens'))} tokens",
        "drawn": "drawn by the seed",
    }.get(source, f"read from {source}")
    text = f"Ranks follow importance: {found.get('method', UNKNOWN)}, {words}."
    top = found.get("top") or {}
    shares = ", ".join(
        f"<code>{escape(str(name))}</code> {number(top, name) or 0:.1%}" for name in top
    )
    return f"<p>{escape(text)}{f' Most gain: {shares}.' if shares else ''}</p>"


def _plan_table(facts: LedgerFacts) -> str:
    head = [
        "device",
        "class",
        "format",
        "ranks",
        "matrices",
        "micro-batch",
        "memory: peak of budget",
        "time a round",
        "what binds",
    ]
    rows = [_plan_cells(facts, plan) for plan in facts.plans]
    note = (
        '<p class="soft">Memory and time are predicted; what was measured stands below it. '
        "Memory is what training adds to the idle process. In a simulation the predicted time is "
        "that of the device class, the measured one that of the simulating machine.</p>"
    )
    return note + table(head, rows, numeric=(4, 5, 6, 7), ready_html=True)


def _plan_cells(facts: LedgerFacts, plan: Line) -> list[str]:
    device = str(plan.get("device", ""))
    peak, budget = number(plan, "peak_bytes"), number(plan, "budget_bytes")
    measured_peak = max(facts.values_of(device, "peak_bytes"), default=None)
    times = facts.values_of(device, "seconds")
    measured_seconds = sum(times) / len(times) if times else None
    share = peak / budget if peak is not None and budget else 0.0
    bar = track(
        [(share, "over" if share > 1 else "")], f"{share:.0%} of the budget" if share else ""
    )
    micro = f"{plan.get('micro_batch', UNKNOWN)} of {plan.get('batch_size', UNKNOWN)}"
    steps = plan.get("local_steps")
    if steps is not None:
        micro += f"<br><small class='soft'>{steps} local step{'' if steps == 1 else 's'}</small>"
    if plan.get("checkpointing"):
        micro += "<br><small class='soft'>checkpointing</small>"
    return [
        f"<span class='w'>{escape(device)}</span>",
        f"<span class='w'>{escape(str(plan.get('device_class', UNKNOWN)))}</span>",
        escape(str(plan.get("format", UNKNOWN))),
        _rank_range(plan),
        str(plan.get("trained_matrices", UNKNOWN)),
        micro,
        f"{bytes_text(peak)} of {bytes_text(budget)}"
        f"{bar}{_measured(measured_peak, bytes_text(measured_peak))}",
        seconds_text(number(plan, "seconds"))
        + _measured(measured_seconds, seconds_text(measured_seconds)),
        escape(str(plan.get("binding") or UNKNOWN)),
    ]


def _measured(value: float | None, text: str) -> str:
    return "" if value is None else f"<div><small class='soft'>measured {text}</small></div>"


def _rank_range(plan: Line) -> str:
    low, high = plan.get("rank_min", UNKNOWN), plan.get("rank_max", UNKNOWN)
    return escape(f"{low}" if low == high else f"{low}\N{EN DASH}{high}")


def _ranks(plan: Line) -> dict[str, int]:
    return {str(name): int(rank) for name, rank in (plan.get("ranks") or {}).items()}


def _picture(plans: Sequence[Line]) -> str:
    rows = [
        HeatRow(str(plan.get("device", "")), _ranks(plan), str(plan.get("format", "")))
        for plan in plans[:_SHOWN_ROWS]
    ]
    picture = heat_map(rows)
    if not picture:
        return ""
    ranks = sorted({rank for row in rows for rank in row.ranks.values() if rank})
    cut = (
        f'<p class="soft">The first {_SHOWN_ROWS} of {len(plans)} devices.</p>'
        if len(plans) > _SHOWN_ROWS
        else ""
    )
    return f"<h3>Trained ranks</h3>{_columns_note(rows)}{_scale(ranks)}{picture}{cut}"


def _columns_note(rows: Sequence[HeatRow]) -> str:
    """Says which matrices the columns of a layer are, where all layers have the same."""
    groups = group_by_layer([name for row in rows for name in row.ranks])
    kinds = [
        tuple(kind_of(name) for name in names)
        for layer, names in groups.items()
        if layer != "other"
    ]
    if not kinds or len(set(kinds)) > 1:
        return '<p class="soft">Columns are matrices, grouped by layer; hover for a name.</p>'
    listed = ", ".join(f"<code>{escape(kind)}</code>" for kind in kinds[0])
    return f'<p class="soft">Columns in each layer, left to right: {listed}.</p>'


def _scale(ranks: Sequence[int]) -> str:
    """Some ranks beside their colours, in the strengths of the heat map."""
    if not ranks:
        return ""
    step = max(1, -(-len(ranks) // 6))
    shown = sorted({*ranks[::step], ranks[-1]})
    swatches = "".join(
        f'<li><i class="square" style="background:var(--heat);'
        f'opacity:{strength(r, ranks[-1]):.2f}">'
        f"</i>rank {r}</li>"
        for r in shown
    )
    frozen = '<li><i class="square" style="border:1px solid var(--rule)"></i>frozen</li>'
    return f'<ul class="legend">{swatches}{frozen}</ul>'


def _rank_table(plans: Sequence[Line]) -> str:
    ranks = [_ranks(plan) for plan in plans]
    groups = group_by_layer([name for found in ranks for name in found])
    names = [name for members in groups.values() for name in members]
    rows = [[name, *(str(found.get(name, 0)) for found in ranks)] for name in names]
    head = ["matrix", *(str(plan.get("device", "")) for plan in plans)]
    return details("Ranks as numbers", table(head, rows, numeric=range(1, len(head))))
