"""`fedtune verify RUN`: whether a run folder holds what its ledger says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedtune.export.remerge import verify_deep
from fedtune.export.run_place import find_run
from fedtune.export.verification import Check, verify_run

_STYLES = {"ok": "green", "wrong": "bold red", "unproven": "yellow"}
_EXIT_WRONG = 2


def verify(
    run: Annotated[str, typer.Argument(help="folder of the run, or its name below runs/")],
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="merge base and adapter again and compare all tensors; needs torch"
        ),
    ] = False,
    base: Annotated[
        str,
        typer.Option(help="base model for --deep in place of the run file's; the same model"),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check a run's ledger, plan, checkpoints and exports; exit code 2 if anything is wrong."""
    folder = find_run(run)
    found: Iterable[Check] = verify_run(folder)
    if deep:
        found = chain(found, verify_deep(folder, base))
    if as_json:
        checks = list(found)
        wrong = sum(check.outcome == "wrong" for check in checks)
        tree = {"folder": str(folder), "ok": not wrong, "checks": [asdict(c) for c in checks]}
        typer.echo(json.dumps(tree, ensure_ascii=False))
    else:
        wrong = _print(found)
    if wrong:
        raise typer.Exit(_EXIT_WRONG)


def _print(found: Iterable[Check]) -> int:
    """Print each check as it is made; how many were wrong."""
    console, wrong, count = Console(), 0, 0
    for check in found:
        count += 1
        wrong += check.outcome == "wrong"
        line = Text(f"{check.outcome:<8} ", style=_STYLES[check.outcome])
        line.append(f"{check.subject}: {check.text}", style="default")
        console.print(line, soft_wrap=True)
    words = f"{wrong} of {count} checks found something wrong" if wrong else "nothing is wrong"
    console.print(Text(words, style="bold red" if wrong else "bold green"))
    return wrong
