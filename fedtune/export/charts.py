"""Small charts as inline SVG: lines, bars and a heat map, without scripts.

Colours are CSS classes (`c0` .. `c7`, `heat`), so that the page decides on light or dark. Every
mark has a `<title>`, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 920
COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 46


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        points: (x, y) in order of x.
        colour: index of the colour class; -1 for the emphasised line in the colour of text.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


@dataclass(frozen=True, slots=True)
class HeatRow:
    """One device of the heat map: rank of each matrix and a short note at the right."""

    name: str
    ranks: Mapping[str, int]
    note: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(series: Sequence[Series], x_label: str, y_label: str, height: int = 320) -> str:
    """One line per series over whole-numbered x."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    x_ticks = sorted({round(x) for x in ticks(x_low, x_high, 10)})
    x_ticks = [x for x in x_ticks if x_low <= x <= x_high]
    x_span, y_span = (x_high - x_low) or 1.0, (y_ticks[-1] - y_ticks[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - x_low) / x_span, (y_ticks[-1] - y) / y_span
        return (
            _LEFT + 8 + right * (WIDTH - _LEFT - _RIGHT - 16),
            _TOP + down * (height - _TOP - _BOTTOM),
        )

    parts = [
        _y_axis([(y, place(x_low, y)[1]) for y in y_ticks], y_label, height),
        _x_axis([(f"{x}", place(x, y_ticks[0])[0]) for x in x_ticks], x_label, height),
    ]
    dots = len(points) <= 1500
    for one in sorted(series, key=lambda one: one.colour < 0):  # the emphasised line on top
        parts.append(_line(one, [place(x, y) for x, y in one.points], dots))
    return _svg("".join(parts), height, f"{y_label} over {x_label}")


def _line(one: Series, places: Sequence[tuple[float, float]], dots: bool) -> str:
    style = "mean" if one.colour < 0 else f"c{one.colour % COLOURS}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = [f'<polyline points="{path}"/>', f'<polyline class="reach" points="{path}"/>']
    if dots or len(places) == 1:
        radius = 3.2 if one.colour < 0 else 2.4
        marks += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(one.name)}, {at:g}: {value:.4g}</title></circle>"
            for (x, y), (at, value) in zip(places, one.points, strict=True)
        ]
    return f'<g class="line {style}"><title>{escape(one.name)}</title>{"".join(marks)}</g>'


def bar_chart(
    bars: Sequence[tuple[str, float, str]], x_label: str, y_label: str, height: int = 220
) -> str:
    """One upright bar per (label, value, hover text)."""
    if not bars:
        return ""
    y_ticks = ticks(0.0, max(value for _, value, _ in bars) or 1.0, 4)
    room = (WIDTH - _LEFT - _RIGHT) / len(bars)
    width = min(room * 0.8, 44.0)
    every = math.ceil(26 / room)
    marks, labels = [], []
    for index, (label, value, text) in enumerate(bars):
        middle = _LEFT + (index + 0.5) * room
        tall = value / y_ticks[-1] * (height - _TOP - _BOTTOM)
        marks.append(
            f'<rect class="bar" x="{middle - width / 2:.1f}" y="{height - _BOTTOM - tall:.1f}" '
            f'width="{width:.1f}" height="{tall:.1f}"><title>{escape(text)}</title></rect>'
        )
        if index % every == 0:
            labels.append((label, middle))
    inner = height - _TOP - _BOTTOM
    axis = [(y, _TOP + inner * (1 - y / y_ticks[-1])) for y in y_ticks]
    parts = _y_axis(axis, y_label, height) + _x_axis(labels, x_label, height) + "".join(marks)
    return _svg(parts, height, f"{y_label} by {x_label}")


# ---------------------------------------------------------------- the heat map


def heat_map(rows: Sequence[HeatRow]) -> str:
    """Devices by matrices, coloured by rank; the columns are grouped by the model's layers."""
    groups = group_by_layer([name for row in rows for name in row.ranks])
    columns = sum(len(names) for names in groups.values())
    if not columns:
        return ""
    names_width = 10 + 7 * max(len(_short(row.name)) for row in rows)
    notes_width = 14 + 7 * max(len(row.note) for row in rows)
    gap = 4
    room = WIDTH - names_width - notes_width - gap * len(groups)
    cell = max(3.0, min(26.0, room / columns))
    height = 21
    top = 6
    lefts: dict[str, float] = {}
    layers: list[tuple[str, float, float]] = []
    x = float(names_width)
    for layer, names in groups.items():
        layers.append((layer, x, cell * len(names)))
        for name in names:
            lefts[name] = x
            x += cell
        x += gap
    highest = max((rank for row in rows for rank in row.ranks.values()), default=1) or 1
    parts = [
        _heat_row(row, lefts, (cell, height), top + index * height, x + 8, highest)
        for index, row in enumerate(rows)
    ]
    below = top + len(rows) * height
    parts.append(_layer_labels(layers, below + 15))
    middle = (names_width + x) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{below + 33}">layer</text>')
    width = max(WIDTH, math.ceil(x + notes_width))
    return _svg("".join(parts), below + 40, "trained rank of each matrix on each device", width)


def _heat_row(
    row: HeatRow,
    lefts: Mapping[str, float],
    size: tuple[float, float],
    top: float,
    note_x: float,
    highest: int,
) -> str:
    cell, height = size
    inset = 1.0 if cell >= 8 else 0.3
    parts = [
        f'<text class="name" x="0" y="{top + 15}">{escape(_short(row.name))}'
        f"<title>{escape(row.name)}</title></text>",
        f'<text class="note" x="{note_x:.1f}" y="{top + 15}">{escape(row.note)}</text>',
    ]
    for name, left in lefts.items():
        rank = row.ranks.get(name, 0)
        opacity = strength(rank, highest)
        fill = f'class="heat" fill-opacity="{opacity:.2f}"' if rank else 'class="frozen"'
        words = f"rank {rank}" if rank else "frozen"
        title = f"<title>{escape(f'{row.name}: {name}: {words}')}</title>"
        parts.append(
            f'<rect {fill} x="{left + inset:.1f}" y="{top + 1}" width="{cell - 2 * inset:.1f}" '
            f'height="{height - 2}">{title}</rect>'
        )
        if rank and cell >= 15:
            tone, middle = "strong" if opacity > 0.55 else "weak", left + cell / 2
            parts.append(
                f'<text class="rank {tone}" x="{middle:.1f}" y="{top + 14.5}">{rank}</text>'
            )
    return "".join(parts)


def strength(rank: int, highest: int) -> float:
    """Opacity of a cell, 0..1, by the rank's logarithm: ranks are doubled, not counted up."""
    return 0.12 + 0.88 * math.log2(1 + rank) / math.log2(1 + highest)


def _layer_labels(layers: Sequence[tuple[str, float, float]], y: float) -> str:
    """Names of the layers under their columns, as many as fit side by side."""
    parts = []
    free_from = -math.inf
    for label, left, width in layers:
        middle, half = left + width / 2, 3.6 * len(label) + 3
        if middle - half >= free_from:
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{y}">{escape(label)}</text>')
            free_from = middle + half
    return "".join(parts)


def group_by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """Matrices by the first number in their path, in order; those without one come last."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(_layer(name), []).append(name)
    order = [kind_of(name) for name in dict.fromkeys(names)]
    for members in groups.values():
        members.sort(key=lambda name: order.index(kind_of(name)))
    numbered = sorted((g for g in groups if g.isdigit()), key=int)
    return {g: groups[g] for g in [*numbered, *(g for g in groups if not g.isdigit())]}


def kind_of(name: str) -> str:
    """What a matrix is within its layer: the path after the layer's number."""
    match = re.search(r"(?:^|\.)\d+\.(.+)$", name)
    return match[1] if match else name


def _layer(name: str) -> str:
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return match[1] if match else "other"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


# ---------------------------------------------------------------- axes


def _y_axis(at: Sequence[tuple[float, float]], label: str, height: int) -> str:
    parts = []
    for value, y in at:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick y" x="{_LEFT - 8}" y="{y + 4:.1f}">{value:.6g}</text>'
        )
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(13 {middle:.0f}) rotate(-90)">'
        f"{escape(label)}</text>"
    )
    return "".join(parts)


def _x_axis(at: Sequence[tuple[str, float]], label: str, height: int) -> str:
    parts = [
        f'<text class="tick" x="{x:.1f}" y="{height - _BOTTOM + 17}">{escape(text)}</text>'
        for text, x in at
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{height - 8}">{escape(label)}</text>')
    return "".join(parts)


def _svg(content: str, height: float, label: str, width: int = WIDTH) -> str:
    return (
        f'<div class="chart"><svg viewBox="0 0 {width} {height:g}" style="min-width:'
        f'{width if width > WIDTH else 560}px" role="img" aria-label="{escape(label)}">'
        f"{content}</svg></div>"
    )
