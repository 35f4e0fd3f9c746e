"""Tables and bars of the report, as HTML."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

_TALL = 40
"""A table with more rows scrolls within its own frame."""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Collection[int] = (),
    ready_html: bool = False,
) -> str:
    """A table whose `numeric` columns stand to the right.

    Args:
        ready_html: the cells are HTML already; default: they are text and are escaped.
    """

    def line(cells: Sequence[str], tag: str, ready: bool) -> str:
        style = [' class="n"' if index in numeric else "" for index in range(len(cells))]
        texts = cells if ready else [escape(cell) for cell in cells]
        marked = (f"<{tag}{s}>{text}</{tag}>" for s, text in zip(style, texts, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line(cells, "td", ready_html) for cells in rows)
    frame = "scroll tall" if len(rows) > _TALL else "scroll"
    top = line(head, "th", False)
    return f'<div class="{frame}"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def track(parts: Sequence[tuple[float, str]], title: str = "") -> str:
    """A bar of parts (share of the whole width, CSS class)."""
    filled = "".join(
        f'<i class="{style}" style="width:{min(max(share, 0.0), 1.0):.2%}"></i>'
        for share, style in parts
    )
    hover = f' title="{escape(title)}"' if title else ""
    return f'<div class="track"{hover}>{filled}</div>'
