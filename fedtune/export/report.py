"""The report of a run: one HTML file that shows what happened, from the ledger alone.

It needs no network, no script and no torch. Every picture has its numbers in a table below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from fedtune.config import load_run_config
from fedtune.export.charts import COLOURS, Series, bar_chart, line_chart
from fedtune.export.ledger_facts import LedgerFacts, Line, number, read_ledger
from fedtune.export.plan_view import plan_section
from fedtune.export.quantities import (
    UNKNOWN,
    bytes_text,
    count_text,
    number_text,
    seconds_text,
)
from fedtune.export.tables import details, table, track

_OWN_COLOUR_UP_TO = COLOURS
"""More devices than this are coloured by class: colours that look alike tell nothing."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from its `ledger.jsonl` and `config.json`.

    Returns:
        The report's path.

    Raises:
        RunError: the ledger is missing or damaged.
        ConfigError: the folder has a config.json that is not a run's.
    """
    facts = read_ledger(folder / "ledger.jsonl")
    facts.paths |= _exports_in(folder)
    page = render(facts, _settings(folder / "config.json"))
    path = folder / "report.html"
    temporary = folder / "report.html.partial"
    temporary.write_text(page, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path


def render(facts: LedgerFacts, settings: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        settings: the run's effective settings as a tree of JSON values; may be empty.
    """
    name = str((settings.get("run") or {}).get("name") or facts.started.get("run", "run"))
    style = resources.files("fedtune.export").joinpath("report.css").read_text(encoding="utf-8")
    sections = [
        _header(name, facts, settings),
        _learning(facts),
        plan_section(facts),
        _traffic(facts),
        _rounds(facts),
        _new_plans(facts),
        _troubles(facts),
        _outputs(facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fedtune: {escape(name)}</title>\n<style>\n{style}</style></head>\n"
        "<body><main>\n" + "\n".join(filter(None, sections)) + "\n</main></body></html>\n"
    )


def _exports_in(folder: Path) -> dict[str, str]:
    """Exports that lie in the run folder now: more may have been written since the run ended."""
    names = {"merged": "merged", "peft": "peft", "onnx": "model.onnx"}
    return {
        kind: f"exports/{name}"
        for kind, name in names.items()
        if (folder / "exports" / name).exists()
    }


def _settings(path: Path) -> Mapping[str, Any]:  # JSON values of many types
    """The run's settings as plain values; none when the folder has none."""
    return load_run_config(path).model_dump() if path.is_file() else {}


# ---------------------------------------------------------------- header


def _header(name: str, facts: LedgerFacts, settings: Mapping[str, Any]) -> str:
    status = f'<span class="chip {facts.status.replace(" ", "-")}">{facts.status}</span>'
    reason = str(facts.ending.get("reason", "")) if facts.status == "failed" else ""
    return (
        f"<h1>{escape(name)}{status}</h1>"
        f'<p class="soft">Federated LoRA tuning with fedtune</p>'
        + (f"<p>{escape(reason)}</p>" if reason else "")
        + _figures(facts)
        + _facts_list(facts, settings)
    )


def _figures(facts: LedgerFacts) -> str:
    before, after = facts.loss_change()
    shown: list[tuple[str, str]] = []
    if before is not None:
        shown.append((number_text(before), "held-out loss before"))
    if after is not None:
        change = f" ({(after / before - 1):+.1%})" if before else ""
        shown.append((number_text(after), f"held-out loss after{change}"))
    accuracy = [number(line, "accuracy") for _, line in sorted(facts.evaluations.items())][-1:]
    if accuracy and accuracy[0] is not None:
        shown.append((f"{accuracy[0]:.1%}", "held-out accuracy after"))
    merged, base = number(facts.tested, "merged_loss"), number(facts.tested, "base_loss")
    if merged is not None:
        versus = f", of the base {number_text(base)}" if base is not None else ""
        shown.append((number_text(merged), f"test loss of the merged model{versus}"))
    shown.append((str(max(facts.rounds, default=0)), "rounds joined"))
    shown.append((str(len(facts.devices)), "devices"))
    total = sum(sum(facts.values_of(d, k)) for d in facts.devices for k in _DIRECTIONS)
    if total:
        shown.append((bytes_text(total), "sent in all"))
    boxes = (
        f'<div class="figure"><b>{escape(value)}</b><small>{escape(what)}</small></div>'
        for value, what in shown
    )
    return f'<div class="figures">{"".join(boxes)}</div>'


def _facts_list(facts: LedgerFacts, settings: Mapping[str, Any]) -> str:
    model, data = settings.get("model") or {}, settings.get("data") or {}
    classes: dict[str, int] = {}
    for plan in facts.plans:
        name = str(plan.get("device_class") or UNKNOWN)
        classes[name] = classes.get(name, 0) + 1
    versions = facts.started.get("versions") or {}
    tokens = sum(number(site, "train_tokens") or 0 for site in facts.sites.values())
    rows = {
        "Run": facts.started.get("run"),
        "Base model": model.get("path"),
        "Task": model.get("task"),
        "Data": data.get("train") or ", ".join(data.get("sites") or {}),
        "Training tokens at the sites": count_text(tokens) if tokens else None,
        "Device classes": ", ".join(
            f"{count} \N{MULTIPLICATION SIGN} {name}" for name, count in classes.items()
        ),
        "Rounds planned": facts.started.get("rounds"),
        "Rule": facts.started.get("rule"),
        "Seed": facts.started.get("seed"),
        "Time": seconds_text(number(facts.ending, "seconds")) if facts.ending else None,
        "Time of the rounds by their plans": seconds_text(number(facts.ending, "planned_seconds")),
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }
    known = ((key, value) for key, value in rows.items() if value not in (None, "", UNKNOWN))
    items = (f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>" for key, value in known)
    return f"<dl>{''.join(items)}</dl>"


# ---------------------------------------------------------------- learning


def _learning(facts: LedgerFacts) -> str:
    held_out = _series(facts, {d: facts.held_out_of(d) for d in facts.devices})
    overall = facts.held_out()
    if overall:
        held_out.append(Series("all devices", overall, -1))
    train = _series(facts, {d: facts.train_of(d) for d in facts.devices})
    parts = ["<h2>Learning</h2>", _legend(facts, bool(overall))]
    if held_out:
        parts.append(
            "<h3>Held-out loss of the joined adapter</h3>"
            + line_chart(held_out, "rounds joined", "held-out loss")
            + _curves_table(held_out, "after round")
        )
    if train:
        parts.append(
            "<h3>Training loss on each device</h3>"
            + line_chart(train, "round", "training loss")
            + _curves_table(train, "round")
        )
    parts.append(_drift(facts))
    return "".join(parts) if held_out or train else ""


def _drift(facts: LedgerFacts) -> str:
    """How each device's update lies to the joined one, round by round."""
    curves: dict[str, list[tuple[int, float]]] = {device: [] for device in facts.devices}
    for (r, device), cosine in sorted(facts.cosines.items()):
        curves.setdefault(device, []).append((r, cosine))
    drift = _series(facts, {d: curves[d] for d in facts.devices})
    if not drift:
        return ""
    return (
        "<h3>Drift between devices</h3>"
        '<p class="soft">Cosine of each update with the joined one: 1 is the same direction, '
        "0 nothing in common, below 0 against it.</p>"
        + line_chart(drift, "round", "cosine")
        + _curves_table(drift, "round")
    )


def _series(facts: LedgerFacts, curves: Mapping[str, list[tuple[int, float]]]) -> list[Series]:
    colours = _colours(facts)
    return [Series(d, points, colours[d]) for d, points in curves.items() if points]


def _colours(facts: LedgerFacts) -> dict[str, int]:
    """A colour for each device: its own for a few devices, its class's for many."""
    if len(facts.devices) <= _OWN_COLOUR_UP_TO:
        return {device: index for index, device in enumerate(facts.devices)}
    classes = _classes(facts)
    return {device: classes.index(_class_of(facts, device)) for device in facts.devices}


def _classes(facts: LedgerFacts) -> list[str]:
    return list(dict.fromkeys(_class_of(facts, device) for device in facts.devices))


def _class_of(facts: LedgerFacts, device: str) -> str:
    return str(facts.plan_of(device).get("device_class") or "unnamed class")


def _legend(facts: LedgerFacts, overall: bool) -> str:
    by_class = len(facts.devices) > _OWN_COLOUR_UP_TO
    names = _classes(facts) if by_class else facts.devices
    items = [
        f'<li><i class="c{index % COLOURS}"></i>{escape(name)}</li>'
        for index, name in enumerate(names)
    ]
    if overall:
        items.append('<li><i style="background:var(--ink)"></i>all devices, held-out</li>')
    note = (
        '<p class="soft">One line per device, coloured by device class; hover for its name.</p>'
        if by_class
        else ""
    )
    return f'<ul class="legend">{"".join(items)}</ul>{note}'


def _curves_table(series: Sequence[Series], first: str) -> str:
    """Rows are rounds, columns are lines; many lines turn it around."""
    rounds = sorted({x for one in series for x, _ in one.points})
    values = [dict(one.points) for one in series]
    if len(series) <= len(rounds):
        head = [first, *(one.name for one in series)]
        rows = [[f"{x:g}", *(number_text(found.get(x)) for found in values)] for x in rounds]
    else:
        head = ["device", *(f"{first} {x:g}" for x in rounds)]
        rows = [
            [one.name, *(number_text(found.get(x)) for x in rounds)]
            for one, found in zip(series, values, strict=True)
        ]
    return details("Numbers", table(head, rows, numeric=range(1, len(head))))


# ---------------------------------------------------------------- traffic and time

_DIRECTIONS = ("download_bytes", "upload_bytes")


def _traffic(facts: LedgerFacts) -> str:
    sums = {d: [sum(facts.values_of(d, key)) for key in _DIRECTIONS] for d in facts.devices}
    largest = max((sum(pair) for pair in sums.values()), default=0.0)
    if not largest:
        return ""
    rows = [
        [
            escape(device),
            bytes_text(down),
            bytes_text(up),
            bytes_text(down + up),
            track([(down / largest, "down"), (up / largest, "up")]),
        ]
        for device, (down, up) in sums.items()
    ]
    legend = (
        '<ul class="legend">'
        '<li><i class="square" style="background:var(--down)"></i>to the device</li>'
        '<li><i class="square" style="background:var(--up)"></i>from the device</li></ul>'
    )
    head = ["device", "down", "up", "both", ""]
    body = table(head, rows, numeric=(1, 2, 3), ready_html=True)
    return f"<h2>Bytes sent</h2>{legend}{body}{_what_leaves(facts)}"


def _what_leaves(facts: LedgerFacts) -> str:
    if not facts.leaves:
        return ""
    total = sum(number(tensor, "bytes") or 0 for tensor in facts.leaves)
    rows = [
        [
            str(tensor.get("name", "")),
            " \N{MULTIPLICATION SIGN} ".join(str(axis) for axis in tensor.get("shape") or []),
            bytes_text(number(tensor, "bytes")),
        ]
        for tensor in facts.leaves
    ]
    summary = (
        f"What leaves a device in a round: {len(rows)} tensors, {bytes_text(total)} "
        "for the largest plan; no sample, no text"
    )
    return details(summary, table(["tensor", "shape", "size"], rows, numeric=(2,)))


def _rounds(facts: LedgerFacts) -> str:
    if not facts.rounds:
        return ""
    lines = sorted(facts.rounds.items())
    bars = [
        (str(r), seconds, f"round {r}: {seconds_text(seconds)}")
        for r, line in lines
        if (seconds := number(line, "seconds")) is not None
    ]
    head = ["round", "reported", "refused", "held-out loss before", "training loss"]
    head += ["time", "down", "up", "energy cut by the rank cap"]
    rows = [[str(r), *_round_cells(line)] for r, line in lines]
    return (
        "<h2>Rounds</h2><h3>Time per round</h3>"
        + bar_chart(bars, "round", "seconds")
        + details("Numbers", table(head, rows, numeric=range(1, len(head))))
    )


def _new_plans(facts: LedgerFacts) -> str:
    """Devices whose plan was made anew between rounds."""
    if not facts.replans:
        return ""
    rows = [
        [str(r), device, str(line.get("reason", "")), str(line.get("change", ""))]
        for (r, device), line in sorted(facts.replans.items())
    ]
    return "<h2>New plans</h2>" + table(["after round", "device", "reason", "change"], rows)


def _round_cells(line: Line) -> list[str]:
    dropped = number(line, "dropped_energy")
    return [
        _people(line.get("reported")),
        _people(line.get("refused")),
        number_text(number(line, "held_out_loss")),
        number_text(number(line, "train_loss")),
        seconds_text(number(line, "seconds")),
        bytes_text(number(line, "download_bytes")),
        bytes_text(number(line, "upload_bytes")),
        UNKNOWN if dropped is None else f"{dropped:.2e}",
    ]


def _people(value: object) -> str:
    """How many: a count, or the length of a list of names."""
    return str(len(value)) if isinstance(value, list) else str(UNKNOWN if value is None else value)


# ---------------------------------------------------------------- troubles and outputs


def _troubles(facts: LedgerFacts) -> str:
    refused = [[str(r), device, reason] for (r, device), reason in sorted(facts.refusals.items())]
    excluded = [["before", device, reason] for device, reason in facts.excluded.items()]
    site_warnings = [
        f"{name}: {text}"
        for name, site in facts.sites.items()
        for text in site.get("warnings") or []
    ]
    parts = ["<h2>Refusals and warnings</h2>"]
    if refused or excluded:
        parts.append(table(["round", "device", "reason"], excluded + refused))
    parts.append(_list([*dict.fromkeys(facts.warnings), *site_warnings]))
    if len(parts) == 2 and not parts[1]:
        parts.append('<p class="soft">None.</p>')
    return "".join(parts)


def _list(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _outputs(facts: LedgerFacts) -> str:
    rows = [[kind, path] for kind, path in facts.paths.items()]
    skipped = {kind: why for kind, why in facts.skipped.items() if kind not in facts.paths}
    rows += [[kind, f"skipped: {reason}"] for kind, reason in skipped.items()]
    return f"<h2>Outputs</h2>{table(['export', 'where'], rows)}" if rows else ""
