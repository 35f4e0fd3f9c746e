"""What every benchmark shares: its two options, its facts about the machine, and its table.

A benchmark prints a table for a person, or with `--json` one JSON object as its last line. Without
`--quick` it also replaces its own section of `docs/benchmarks.md`, which names commit, machine and
date, so that no number stands there without its source.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
PAGE = ROOT / "docs" / "benchmarks.md"


def parse_arguments(
    description: str, add_options: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """`--quick` (under 50 s on 2 cores), `--json`, and where public models and data are.

    Args:
        add_options: adds a script's own options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version, under 50 s")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of models and data")
    if add_options is not None:
        add_options(parser)
    return parser.parse_args()


def has_public_data(shared: Path) -> bool:
    """Whether the public model and data are there; where they are not, stderr says so."""
    if (shared / "models" / "stories260k").is_dir():
        return True
    print(f"the public model and data are not at {shared}", file=sys.stderr)
    return False


def machine() -> str:
    """Processor, cores and system, in a few words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        name = found[1] if found else name
    return (
        f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit that is measured, with a plus when files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of equal keys as a Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines)


def publish(title: str, command: str, body: str, where: str = "") -> None:
    """Replace the section `title` of docs/benchmarks.md, or add it.

    Args:
        where: the machine that measured, if it is not this one.
    """
    facts = f"`{command}`; commit {commit()}; {where or machine()}; {datetime.now(UTC):%Y-%m-%d}."
    section = f"## {title}\n\n{facts}\n\n{body.strip()}\n"
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    if re.search(pattern, text, flags=re.MULTILINE | re.DOTALL):
        text = re.sub(pattern, lambda _: section + "\n", text, flags=re.MULTILINE | re.DOTALL)
    else:
        text = text.rstrip() + "\n\n" + section
    PAGE.write_text(text.rstrip() + "\n", encoding="utf-8")


def print_json(value: Mapping[str, object]) -> None:
    """One JSON object on one line; it must be the last."""
    print(json.dumps(value), flush=True)
