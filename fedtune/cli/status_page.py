"""What a person sees of a run's status: lines on the run, a row per device, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli.amounts import bytes_text, one_line, seconds_text, sparkline
from fedtune.export.device_view import DeviceView
from fedtune.export.run_view import RunView

_MOST_ROWS = 30
_MOST_REASONS = 5
_WIDE_FROM = 100
_STYLES = {
    "starting": "bold",
    "running": "bold cyan",
    "finished": "bold green",
    "interrupted": "bold yellow",
    "failed": "bold red",
    "stopped": "bold red",
}


def print_status(console: Console, view: RunView) -> None:
    """Print a run's status."""
    ascii_only = not console.encoding.lower().startswith("utf")
    console.print(_headline(view), soft_wrap=True)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in _facts(view, ascii_only):
        lines.add_row(name, Text(text))
    console.print(lines)
    if view.devices:
        console.print(_device_table(view.devices, console.width))
    for text in _troubles(view):
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _headline(view: RunView) -> Text:
    line = Text.assemble((f"run {one_line(view.run)} ", "bold"), (view.state, _STYLES[view.state]))
    line.append(f", round {view.round} of {view.rounds}")
    if view.seconds_left:
        line.append(f", about {seconds_text(view.seconds_left)} left")
    if view.advice:
        line.append(f": {one_line(view.advice, 400)}", style="yellow")
    return line


def _facts(view: RunView, ascii_only: bool) -> Iterator[tuple[str, str]]:
    if view.started:
        yield "started", _moment(view.started)
    if view.last_event and view.idle_seconds is not None:
        yield "last", f"{one_line(view.phase)}, {seconds_text(view.idle_seconds)} ago"
    if view.held_out:
        yield "loss", _loss(view, ascii_only)
    if view.accuracy is not None:
        yield "accuracy", f"{view.accuracy:.1%}"
    if view.seconds_per_round is not None:
        yield "pace", f"{seconds_text(view.seconds_per_round)} a round"
    if view.round:
        down, up = bytes_text(view.download_bytes), bytes_text(view.upload_bytes)
        yield "traffic", f"{down} to the devices, {up} back"
    if view.dropped_energy is not None:
        most = f", at most {view.dropped_energy_most:.2%}" if view.dropped_energy_most else ""
        yield "cut off", f"{view.dropped_energy:.2%} by the rank cap in the last round{most}"
    if view.cosines:
        low, mean, high = view.cosines
        yield "drift", f"cosine with the joined update {low:.2f} to {high:.2f}, mean {mean:.2f}"
    for kind, path in view.paths.items():
        yield one_line(kind), one_line(path)
    yield "folder", one_line(view.folder)


def _moment(text: str) -> str:
    """A moment in UTC, to the second."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    except ValueError:
        return one_line(text)


def _loss(view: RunView, ascii_only: bool) -> str:
    arrow = "->" if ascii_only else "→"
    losses = [loss for _, loss in view.held_out]
    line = f"{losses[0]:.4f}"
    if len(losses) > 1:
        line += f" {arrow} {losses[-1]:.4f}  {sparkline(losses, 20, ascii_only)}"
    if view.held_out_best is not None and view.held_out_best < losses[-1]:
        line += f"  best {view.held_out_best:.4f} after round {view.best_round}"
    return line


# ---------------------------------------------------------------- devices


def _device_table(devices: Sequence[DeviceView], width: int) -> Table:
    """A row per device; of many, those with trouble come first. A narrow terminal gets less."""
    wide = width >= _WIDE_FROM
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", overflow="ellipsis", no_wrap=True, max_width=28)
    if wide:
        table.add_column("class", overflow="ellipsis", no_wrap=True, max_width=16)
        table.add_column("backbone", no_wrap=True)
    for name in ("rank", "round", "held-out", *(("train", "share") if wide else ()), "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("refused", justify="right", no_wrap=True)
    late = any(device.late for device in devices)
    if late:
        table.add_column("late", justify="right", no_wrap=True)
    shown = list(devices)
    if len(shown) > _MOST_ROWS:
        shown.sort(key=lambda device: (-device.refused, device.last_round))
    for device in shown[:_MOST_ROWS]:
        table.add_row(*_cells(device, wide, late))
    if len(shown) > _MOST_ROWS:
        table.add_row(Text(f"and {len(shown) - _MOST_ROWS} more; --json has all", style="dim"))
    return table


def _cells(device: DeviceView, wide: bool, late: bool) -> Iterator[Text]:
    low, high = device.rank_min, device.rank_max
    yield Text(one_line(device.device, 40))
    if wide:
        yield Text(one_line(device.device_class, 40))
        yield Text(one_line(device.format, 30))
    yield Text((f"{high}" if low == high else f"{low}-{high}") if high else "-")
    yield Text(f"{device.last_round or '-'}")
    yield _number(device.held_out_loss, 4)
    if wide:
        yield _number(device.train_loss, 4)
        yield _number(device.share, 3)
    yield _number(device.cosine, 2)
    yield Text(f"{device.refused or '-'}", style="red" if device.refused else "")
    if late:
        yield Text(f"{device.late or '-'}")


def _number(value: float | None, digits: int) -> Text:
    return Text("-" if value is None else f"{value:.{digits}f}")


def _troubles(view: RunView) -> Iterator[str]:
    refused = sorted((d for d in view.devices if d.refused), key=lambda d: -d.refused_round)
    for device in refused[:_MOST_REASONS]:
        reason = one_line(device.refused_reason)
        yield f"round {device.refused_round}, {one_line(device.device)} refused: {reason}"
    for name, reason in list(view.excluded.items())[:_MOST_REASONS]:
        yield f"{one_line(name)} is left out: {one_line(reason)}"
    if view.warnings:
        count = "1 warning" if view.warnings == 1 else f"{view.warnings} warnings, the last"
        yield f"{count}: {one_line(view.last_warning)}"
