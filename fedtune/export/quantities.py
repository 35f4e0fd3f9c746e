"""Numbers as a person reads them: bytes, seconds, losses; an unknown one is a dash."""

from __future__ import annotations

UNKNOWN = "\N{EN DASH}"


def bytes_text(size: float | None) -> str:
    """`1.5 MB`; decimal units, three digits."""
    if size is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"


def seconds_text(seconds: float | None) -> str:
    """`0.042 s`, `3.1 s`, `2 min 5 s`, `1 h 3 min`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 99.95:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def number_text(value: float | None, digits: int = 4) -> str:
    """A plain number with so many digits after the point."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def count_text(value: float | None) -> str:
    """`12 345`."""
    return UNKNOWN if value is None else f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
