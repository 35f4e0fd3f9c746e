"""Log records as a person reads them, and as a program does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from fedtune.deploy.logs import log_line

_STYLES = {"warning": "yellow", "error": "red", "critical": "bold red", "debug": "dim"}


def log_view(json_lines: bool, stream: TextIO | None = None) -> Callable[[Mapping[str, Any]], None]:
    """What shows records: lines for a person on a terminal, JSON lines elsewhere.

    Args:
        json_lines: JSON lines on a terminal, too.
        stream: default: standard output.
    """
    out = stream if stream is not None else sys.stdout
    if json_lines or not out.isatty():

        def show_json(record: Mapping[str, Any]) -> None:
            out.write(log_line(record) + "\n")
            out.flush()

        return show_json
    console = Console(file=out, highlight=False)

    def show(record: Mapping[str, Any]) -> None:
        console.print(record_text(record), soft_wrap=True)

    return show


def record_text(record: Mapping[str, Any]) -> Text:
    """One record: local time, process, message, and its fields where they are few and short.

    Characters that would control a terminal are shown as what they are.
    """
    level = str(record.get("level", "info"))
    parts = [_printable(str(record.get("message", "")))]
    fields = record.get("fields")
    if isinstance(fields, Mapping):
        parts += [_printable(f"{key}={value}")[:80] for key, value in list(fields.items())[:6]]
    text = Text()
    text.append(f"{_clock(record.get('time'))} {record.get('process', '')!s:<10} ", style="dim")
    if level in ("warning", "error", "critical"):
        text.append(f"{level}: ", style=_STYLES[level])
    text.append("  ".join(parts), style=_STYLES.get(level, "default"))
    return text


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _clock(moment: object) -> str:
    try:
        parsed = datetime.fromisoformat(str(moment))
    except ValueError:
        return "--:--:--"
    return parsed.replace(tzinfo=parsed.tzinfo or UTC).astimezone().strftime("%H:%M:%S")
