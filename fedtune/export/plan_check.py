"""Whether a run's `plan.json` says what its ledger says was planned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtune.export.ledger_facts import Line
from fedtune.plan.plan_file import NUMBERS, checksum
from fedtune.plan.written import Entry, WrittenPlan, read_plan


def plan_difference(path: Path, rows: Sequence[Line]) -> str:
    """The first place where a plan file and the rows of `planned` differ; empty where they agree.

    Args:
        rows: one per device; later changes, the events `replanned`, are not in the file.

    Raises:
        PlanError: the file cannot be read or is no plan.
    """
    written = read_plan(path)
    tree = json.loads(path.read_text(encoding="utf-8-sig"))
    if written.checksum != checksum(tree):
        return f"expected the checksum {checksum(tree)} of its content, found {written.checksum!r}"
    named = {str(row.get("device")) for row in rows}
    if set(written.devices) != named:
        odd = min(set(written.devices) ^ named)
        where = "the file" if odd in written.devices else "the ledger"
        return f"expected the same devices as in the ledger, found {odd!r} in {where} only"
    return next(filter(None, (_row_difference(written, row) for row in rows)), "")


def _row_difference(written: WrittenPlan, row: Line) -> str:
    device = str(row.get("device"))
    found = written.devices[device]
    own = Entry() if isinstance(found, str) else found
    of_class = found if isinstance(found, str) else found.class_
    usual = written.classes.get(of_class or "", Entry())
    forms: Mapping[str, str] = row.get("forms") or {}
    ranks: Mapping[str, int] = row.get("ranks") or {}
    pairs: list[tuple[str, object, object]] = [
        (key, row.get(key), _first(getattr(own, key), getattr(usual, key)))
        for key in (*NUMBERS, "checkpointing")
    ]
    for name, form in forms.items():
        in_file = _first(own.formats.get(name), own.format, usual.formats.get(name), usual.format)
        pairs.append((f"format of {name}", form, in_file))
        rank = _first(own.ranks.get(name), own.rank, usual.ranks.get(name), usual.rank)
        pairs.append((f"rank of {name}", ranks.get(name, 0), rank))
    for what, expected, in_file in pairs:
        if expected != in_file:
            return f"device {device}, {what}: expected {expected}, found {in_file}"
    return ""


def _first(*values: object) -> object:
    """The first value that is there."""
    return next((value for value in values if value is not None), None)
