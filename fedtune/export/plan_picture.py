"""A plan's ranks as one SVG picture: a panel per class of devices, matrices by layers.

The file stands alone: it has its own colours for light and dark, a legend, a hover text for every
cell, and a text alternative that says in words what the panels show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fedtune.export.charts import group_by_layer, kind_of, strength

_MARGIN = 24
_TITLE = 46
_ROW = 18
_CHARACTER = 6.6
"""Width of a character of the 12-pixel text, on the safe side."""
_STYLE = """
svg { --paper: #ffffff; --ink: #1c2330; --soft: #5b6575; --rule: #c3cad6; --heat: #2a5db0; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #12161d; --ink: #e6eaf1; --soft: #9aa5b5; --rule: #465063; --heat: #79aef5; }
}
.paper { fill: var(--paper); }
text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.soft { fill: var(--soft); }
.title { font-size: 17px; font-weight: 600; }
.panel { font-size: 14px; font-weight: 600; }
.heat { fill: var(--heat); }
.frozen { fill: none; stroke: var(--rule); stroke-width: 0.7; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """What devices of one kind train.

    Attributes:
        note: what else is worth knowing of them, in a few words.
        ranks: matrix name -> rank, 0 for one that stays frozen; the model's matrices in any order.
    """

    name: str
    note: str
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """Ranks laid out: a row per kind of matrix, a column per layer.

    Attributes:
        ranks: (kind, layer) -> rank; a layer may lack a kind.
    """

    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    ranks: Mapping[tuple[str, str], int]


def rank_grid(ranks: Mapping[str, int]) -> Grid:
    """Lay out ranks by kind of matrix and layer."""
    groups = group_by_layer(list(ranks))
    layer_of = {name: layer for layer, names in groups.items() for name in names}
    kinds = dict.fromkeys(kind_of(name) for names in groups.values() for name in names)
    placed = {(kind_of(name), layer_of[name]): rank for name, rank in ranks.items()}
    return Grid(tuple(kinds), tuple(groups), placed)


def plan_picture(title: str, panels: Sequence[Panel]) -> str:
    """The picture as the text of an SVG file."""
    grids = [rank_grid(panel.ranks) for panel in panels]
    highest = max((rank for panel in panels for rank in panel.ranks.values()), default=0)
    label = max((len(kind) for grid in grids for kind in grid.kinds), default=0)
    left = _MARGIN + math.ceil(label * _CHARACTER) + 10
    columns = max((len(grid.layers) for grid in grids), default=1)
    cell = max(8.0, min(26.0, 860 / columns))
    y = float(_MARGIN + _TITLE)
    parts = []
    for panel, grid in zip(panels, grids, strict=True):
        drawn, height = _panel(panel, grid, (left, y), cell, highest)
        parts.append(drawn)
        y += height
    width = max(560, math.ceil(left + columns * cell + _MARGIN))
    height = math.ceil(y)
    words = _words(title, panels, grids)
    head = (
        f'<rect class="paper" width="{width}" height="{height}"/>'
        f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 10}">{escape(title)}</text>'
        f"{_legend(highest, _MARGIN + 34)}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title words">'
        f'<title id="title">{escape(title)}</title><desc id="words">{escape(words)}</desc>'
        f"<style>{_STYLE}</style>{head}{''.join(parts)}</svg>\n"
    )


def _panel(
    panel: Panel, grid: Grid, place: tuple[float, float], cell: float, highest: int
) -> tuple[str, float]:
    """One panel from a place down, and the height that it takes."""
    left, top = place
    parts = [
        f'<text class="panel" x="{_MARGIN}" y="{top + 14:.0f}">{escape(panel.name)}'
        f'<tspan class="soft" font-weight="400" font-size="12" dx="10">{escape(panel.note)}'
        "</tspan></text>"
    ]
    first = top + 24
    for row, kind in enumerate(grid.kinds):
        y = first + row * _ROW
        parts.append(
            f'<text class="soft end" x="{left - 8}" y="{y + 13:.0f}">{escape(kind)}</text>'
        )
        for column, layer in enumerate(grid.layers):
            rank = grid.ranks.get((kind, layer))
            if rank is not None:
                x = left + column * cell
                parts.append(
                    _cell(f"{panel.name}, layer {layer}, {kind}", rank, x, y, cell, highest)
                )
    below = first + len(grid.kinds) * _ROW
    parts.append(_layer_numbers(grid.layers, left, cell, below + 14))
    return f'<g role="group" aria-label="{escape(panel.name)}">{"".join(parts)}</g>', (
        below + 42 - top
    )


def _cell(name: str, rank: int, x: float, y: float, cell: float, highest: int) -> str:
    words = f"rank {rank}" if rank else "frozen"
    fill = (
        f'class="heat" fill-opacity="{strength(rank, highest):.2f}"' if rank else 'class="frozen"'
    )
    return (
        f'<rect {fill} x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" '
        f'height="{_ROW - 2}"><title>{escape(f"{name}: {words}")}</title></rect>'
    )


def _layer_numbers(layers: Sequence[str], left: float, cell: float, y: float) -> str:
    """Numbers of the layers under their columns, as many as fit side by side."""
    every = max(1, math.ceil((max(map(len, layers), default=1) * _CHARACTER + 6) / cell))
    return "".join(
        f'<text class="soft middle" x="{left + (column + 0.5) * cell:.1f}" y="{y:.0f}">'
        f"{escape(layer)}</text>"
        for column, layer in enumerate(layers)
        if column % every == 0
    )


def _legend(highest: int, y: float) -> str:
    """Some ranks beside their colours, and what a frozen matrix looks like."""
    shown = sorted({rank for rank in (1, highest // 4, highest // 2, highest) if rank > 0})
    x, parts = float(_MARGIN), []
    marks = [("frozen", 'class="frozen"')]
    marks += [
        (f"rank {rank}", f'class="heat" fill-opacity="{strength(rank, highest):.2f}"')
        for rank in shown
    ]
    for words, fill in marks:
        parts.append(
            f'<rect {fill} x="{x:.1f}" y="{y - 11}" width="14" height="14"/>'
            f'<text class="soft" x="{x + 20:.1f}" y="{y}">{words}</text>'
        )
        x += 36 + len(words) * _CHARACTER
    parts.append(f'<text class="soft" x="{x:.1f}" y="{y}">columns are layers</text>')
    return "".join(parts)


def _words(title: str, panels: Sequence[Panel], grids: Sequence[Grid]) -> str:
    """The text alternative: what each panel trains, and the ranks of each kind of matrix."""
    sentences = [f"{title}."]
    for panel, grid in zip(panels, grids, strict=True):
        trained = sum(rank > 0 for rank in panel.ranks.values())
        kinds = []
        for kind in grid.kinds:
            found = [rank for (of, _), rank in grid.ranks.items() if of == kind]
            low, high = min(found), max(found)
            kinds.append(f"{kind} {low}" if low == high else f"{kind} {low} to {high}")
        sentences.append(
            f"{panel.name} ({panel.note}) trains {trained} of {len(panel.ranks)} matrices over "
            f"{len(grid.layers)} layers; ranks: {', '.join(kinds)}."
        )
    return " ".join(sentences)
