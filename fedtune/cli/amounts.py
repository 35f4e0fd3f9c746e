"""Bytes, seconds and curves in the short form that a person reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"


def bytes_text(count: float) -> str:
    """A size in powers of 1000: `812 B`, `3.4 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration: `1.3 ms`, `0.42 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if 0 < seconds < 0.00995:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: Sequence[float], width: int = 40, ascii_only: bool = False) -> str:
    """The course of some numbers in one line, the highest as a full block.

    Args:
        values: only finite ones are drawn.
        width: with more values than this, each character shows the last value of its stretch.
        ascii_only: for a terminal that cannot show blocks.
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > width:
        finite = [finite[(i + 1) * len(finite) // width - 1] for i in range(width)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    if high == low:
        return blocks[len(blocks) // 2] * len(finite)
    steps = len(blocks) - 1
    return "".join(blocks[round((value - low) / (high - low) * steps)] for value in finite)


def one_line(text: object, longest: int = 200) -> str:
    """A text that may come from a device, without line breaks or terminal control characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= longest else line[: longest - 3] + "..."
