"""Tables and lines of which a run's display is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtune.cli.amounts import bytes_text, one_line, seconds_text, sparkline
from fedtune.cli.progress import DeviceRow, RunProgress, number

_MOST_ROWS = 12
_SHOWN_TOP = 3
_WIDE_FROM = 125
_WIDE = (
    "devices",
    "class",
    "backbone",
    "rank",
    "matrices",
    "batch",
    "memory",
    "time",
    "down",
    "up",
    "limited by",
)
_NARROW = ("devices", "backbone", "rank", "memory", "time", "limited by")
_STYLES = {
    "waiting": "dim",
    "training": "cyan",
    "reported": "green",
    "refused": "red",
    "late": "yellow",
}


def headline(progress: RunProgress) -> RenderableType:
    """Run, bar of rounds, and time left."""
    done, total = progress.finished_rounds, progress.rounds
    words = f"round {min(done + 1, total)} of {total}" if not progress.outcome else progress.outcome
    left = progress.seconds_left
    if left is not None and not progress.outcome:
        words += f", about {seconds_text(left)} left"
    line = Table.grid(padding=(0, 2))
    line.add_row(
        Text(progress.run, style="bold"),
        ProgressBar(total=max(total, 1), completed=done, width=30),
        Text(words),
    )
    return line


def device_table(progress: RunProgress) -> Table:
    """The devices of the current round; of many, those at work come first."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("device", overflow="ellipsis", no_wrap=True, max_width=28)
    table.add_column("state")
    for name in ("held-out", "train loss", "moved", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(progress.rows.values())
    if len(rows) > _MOST_ROWS:
        order = {"training": 0, "refused": 1, "reported": 2, "late": 3, "waiting": 4}
        rows.sort(key=lambda row: order[row.state])
    for row in rows[:_MOST_ROWS]:
        table.add_row(*_device_cells(row))
    if len(rows) > _MOST_ROWS:
        states = Counter(row.state for row in rows[_MOST_ROWS:])
        rest = ", ".join(f"{count} {state}" for state, count in states.items())
        table.add_row(Text(f"and {len(rows) - _MOST_ROWS} more", style="dim"), Text(rest))
    return table


def _device_cells(row: DeviceRow) -> list[Text]:
    def shown(value: float | None, text: str) -> Text:
        return Text("" if value is None else text)

    return [
        Text(row.name),
        Text(row.state, style=_STYLES[row.state]),
        shown(row.loss_before, f"{row.loss_before or 0:.4f}"),
        shown(row.train_loss, f"{row.train_loss or 0:.4f}"),
        shown(row.moved_bytes, bytes_text(row.moved_bytes or 0)),
        shown(row.seconds, seconds_text(row.seconds or 0)),
    ]


def loss_line(progress: RunProgress, ascii_only: bool) -> Text:
    """Held-out loss from the first to the last, and its course."""
    curve = progress.loss_curve
    line = Text("held-out loss ")
    line.append(f"{curve[0]:.4f}")
    if len(curve) > 1:
        arrow = " -> " if ascii_only else " → "
        line.append(f"{arrow}{curve[-1]:.4f}", style="bold")
        line.append(f"  {sparkline(curve, ascii_only=ascii_only)}", style="cyan")
    return line


def notice_lines(progress: RunProgress) -> list[Text]:
    """The last warnings and refusals."""
    return [Text(text, style="yellow", overflow="fold") for text in progress.notices]


# ---------------------------------------------------------------- the plan


def plan_table(rows: Sequence[object], width: int) -> Table:
    """What each device does; devices with equal plans share a row.

    Args:
        rows: of the event `planned`.
        width: of the terminal in characters; a narrow one gets fewer columns.
    """
    columns = _WIDE if width >= _WIDE_FROM else _NARROW
    table = Table(title="plan", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in columns:
        text = name in ("devices", "class", "backbone", "limited by")
        table.add_column(
            name,
            justify="left" if text else "right",
            no_wrap=name not in ("devices", "limited by"),
            overflow="fold",
        )
    for cells in _plan_groups(rows):
        table.add_row(*(Text(cells[name]) for name in columns))
    return table


def plan_lines(rows: Sequence[object]) -> list[str]:
    """The same in sentences, for a log file."""
    return [
        "plan: {devices} ({class}): {backbone}, rank {rank} on {matrices} matrices, batch {batch}, "
        "{memory}, {time} a round, {down} down, {up} up; limited by {limited by}".format(**cells)
        for cells in _plan_groups(rows)
    ]


def _plan_groups(rows: Sequence[object]) -> list[dict[str, str]]:
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row in rows:
        if isinstance(row, Mapping):
            cells = tuple(_plan_cells(row).items())
            groups.setdefault(cells, []).append(one_line(row.get("device"), 40))
    return [
        {"devices": names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"}
        | dict(cells)
        for cells, names in groups.items()
    ]


def _plan_cells(row: Mapping[str, object]) -> dict[str, str]:
    def size(name: str) -> str:
        return bytes_text(number(row, name) or 0)

    low, high = row.get("rank_min"), row.get("rank_max")
    batch, micro = row.get("batch_size"), row.get("micro_batch")
    return {
        "class": one_line(row.get("device_class", ""), 40),
        "backbone": one_line(row.get("format", ""))
        + (" +ckpt" if row.get("checkpointing") else ""),
        "rank": f"{high}" if low == high else f"{low}-{high}",
        "matrices": f"{row.get('trained_matrices')}",
        "batch": _batch(batch, micro),
        "memory": f"{size('peak_bytes')} of {size('budget_bytes')}",
        "time": seconds_text(number(row, "seconds") or 0),
        "down": size("download_bytes"),
        "up": size("upload_bytes"),
        "limited by": one_line(row.get("binding", ""), 60) or "nothing",
    }


def _batch(batch: object, micro: object) -> str:
    """Passes x samples of one pass, such as `4 x 4` for a batch of 16 in micro-batches of 4."""
    if not isinstance(batch, int) or not isinstance(micro, int) or micro < 1 or batch == micro:
        return f"{batch}"
    return f"{batch // micro} x {micro}"


def importance_line(fields: Mapping[str, object]) -> str:
    """What the ranks follow, and where they are worth most: of the event `importance_found`."""
    source, tokens = fields.get("source"), number(fields, "tokens") or 0
    words = {"measured": f"measured on {tokens:,.0f} tokens", "drawn": "drawn by the seed"}
    line = f"importance: {one_line(fields.get('method'))}, "
    line += words.get(str(source), f"read from {one_line(source)}")
    top = fields.get("top")
    if isinstance(top, Mapping) and top:
        shares = (
            f"{one_line(name)} ({number(top, name) or 0:.1%})" for name in list(top)[:_SHOWN_TOP]
        )
        line += f"; most gain in {', '.join(shares)}"
    return line


def leaving_line(tensors: Sequence[object], stage: object) -> str:
    """What leaves a device, in one sentence.

    Args:
        stage: of the event `leaves_device`: once before the plan (`calibration`), or each round.
    """
    rows = [row for row in tensors if isinstance(row, Mapping)]
    total = sum(number(row, "bytes") or 0 for row in rows)
    when = "once, before the plan," if stage == "calibration" else "each round"
    return (
        f"{when} a device sends at most {len(rows)} tensors, {bytes_text(total)}, "
        f"from {one_line(rows[0].get('name'))} to {one_line(rows[-1].get('name'))}; "
        "no sample leaves it"
    )


# ---------------------------------------------------------------- the end


def summary(
    progress: RunProgress,
    ascii_only: bool,
    without_end: str = "stopped",
    to_go_on: str = "give the same command again",
) -> RenderableType:
    """What is left to read when the run is over.

    Args:
        without_end: what to say of a run whose end was not seen.
        to_go_on: what a person does to continue a run that did not finish.
    """
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim")
    lines.add_column(overflow="fold")
    lines.add_row("rounds", f"{progress.finished_rounds} of {progress.rounds}")
    if progress.held_out:
        lines.add_row("loss", loss_line(progress, ascii_only))
    if progress.accuracy is not None:
        lines.add_row("accuracy", f"{progress.accuracy:.1%}")
    down, up = bytes_text(progress.download_bytes), bytes_text(progress.upload_bytes)
    lines.add_row("traffic", f"{down} to the devices, {up} back")
    if progress.refused:
        updates = "1 update" if progress.refused == 1 else f"{progress.refused} updates"
        lines.add_row("refused", f"{updates}; the reasons are in ledger.jsonl")
    for kind, path in progress.exports.items():
        lines.add_row(Text(kind), Text(path))
    for kind, reason in progress.skipped.items():
        lines.add_row(Text(kind), Text(f"not written: {reason}", style="yellow"))
    lines.add_row("folder", Text(progress.folder))
    if progress.outcome in ("interrupted", "failed"):
        lines.add_row("to go on", Text(to_go_on))
    return Group(_outcome(progress, without_end), lines)


def _outcome(progress: RunProgress, without_end: str) -> Text:
    words = {
        "finished": ("finished", "bold green"),
        "interrupted": (f"interrupted in round {progress.round}", "bold yellow"),
        "failed": (f"failed: {progress.failure}", "bold red"),
        "": (without_end, "bold yellow"),
    }
    text, style = words[progress.outcome]
    if progress.outcome == "finished" and progress.seconds is not None:
        text += f" in {seconds_text(progress.seconds)}"
    return Text.assemble((f"run {progress.run} ", "bold"), (text, style))
