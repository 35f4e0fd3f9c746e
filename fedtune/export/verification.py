"""Whether a run folder holds what its ledger says: chain, plan, checkpoints and exports.

Everything rests on the ledger: its chain is checked first, and what it names is compared with what
lies in the folder. That proves the folder against accidents and careless editing. Who can rewrite
all of it, with a new chain, is not found out: keep the last line's `hash` elsewhere for that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.errors import PlanError, RunError
from fedtune.export.ledger_facts import Line, gather
from fedtune.export.plan_check import plan_difference
from fedtune.wire.checkpoint import checkpoints, read_checkpoint
from fedtune.wire.file_digests import export_files, file_digest
from fedtune.wire.ledger_chain import verify_whole_lines

EXPORT_PLACES = {"merged": "exports/merged", "peft": "exports/peft", "onnx": "exports/model.onnx"}
"""Where each export of a model lies in a run folder."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        subject: what it was, such as `ledger` or `exports/merged`.
        outcome: `ok`, `wrong`, or `unproven` where nothing says what it should be.
        text: what was found, and what was expected where that is not it.
    """

    subject: str
    outcome: Literal["ok", "wrong", "unproven"]
    text: str


def verify_run(folder: Path) -> Iterator[Check]:
    """Check a run folder against its ledger, one thing after the other. It is only read.

    Source: design.md, section 7.
    """
    try:
        lines, torn = verify_whole_lines(folder / "ledger.jsonl")
        if not lines:
            raise RunError(f"{folder / 'ledger.jsonl'}: expected a line per event, found none")
    except RunError as error:
        yield Check("ledger", "wrong", str(error))
        # What the ledger would say of the rest is not known: only digests beside files are left.
        for path in checkpoints(folder / "checkpoints"):
            yield _own_digest(path)
        return
    yield _chain(lines, torn)
    facts = gather(lines)
    over = facts.status == "finished" and any(line["kind"] == "exported" for line in lines)
    last = max(facts.rounds, default=0)
    yield _status(folder / "status.json", last, over)
    yield _config(folder / "config.json", lines)
    yield _plan(folder / "plan.json", facts.plans)
    yield from _checkpoints(folder / "checkpoints", lines, last, over)
    yield from _exports(folder, lines)


# ---------------------------------------------------------------- the ledger and what it began with


def _chain(lines: Sequence[Line], torn: bool) -> Check:
    words = f"{len(lines)} lines, each chained to the one before; the last has hash "
    words += f"{str(lines[-1]['hash'])[:16]}"
    if torn and lines[-1]["kind"] == "exported":
        return Check("ledger", "wrong", f"{words}, and after the run's last line comes a half one")
    rest = "; half a line follows, as it is written or as a killed run left it" if torn else ""
    return Check("ledger", "ok", words + rest)


def _status(path: Path, last: int, over: bool) -> Check:
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        state, round = str(status["state"]), int(status["round"])
    except (OSError, ValueError, KeyError, TypeError):
        return Check("status.json", "wrong", "expected a state and a round, found no such file")
    if over and state not in ("finished", "running"):
        return Check("status.json", "wrong", f"expected the state finished, found {state}")
    if state == "finished" and not over:
        return Check("status.json", "wrong", "it says finished, and the ledger does not")
    if round > last or (state == "finished" and round != last):
        return Check("status.json", "wrong", f"expected round {last}, found {round}")
    return Check("status.json", "ok", f"{state} at round {round}, as the ledger has it")


def _config(path: Path, lines: Sequence[Line]) -> Check:
    """The settings that the ledger repeats; of a continued run, as it was continued last."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {
            "rounds": config["run"]["rounds"],
            "seed": config["run"]["seed"],
            "rule": config["aggregate"]["rule"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return Check("config.json", "wrong", "expected the run's settings, found no such file")
    told: dict[str, Any] = {}  # JSON values
    for line in lines:
        if line["kind"] in ("run_started", "run_resumed"):
            told |= {key: line[key] for key in found if key in line}
    for key, expected in told.items():
        if key == "rounds" and any(line["kind"] == "run_resumed" for line in lines):
            continue  # a run may be continued for more rounds than it began with
        if found[key] != expected:
            return Check("config.json", "wrong", f"{key}: expected {expected}, found {found[key]}")
    return Check("config.json", "ok", f"{', '.join(told)} as in the ledger")


def _plan(path: Path, rows: Sequence[Line]) -> Check:
    if not rows:
        if path.exists():
            return Check("plan.json", "unproven", "the ledger has no plan")
        return Check("plan.json", "ok", "nothing was planned yet")
    try:
        difference = plan_difference(path, rows)
    except PlanError as error:
        return Check("plan.json", "wrong", str(error))
    if difference:
        return Check("plan.json", "wrong", difference)
    return Check("plan.json", "ok", f"{len(rows)} devices, planned as in the ledger")


# ---------------------------------------------------------------- checkpoints


def _own_digest(path: Path) -> Check:
    """A checkpoint against the digest that lies beside it."""
    subject = f"checkpoints/{path.name}"
    try:
        found = read_checkpoint(path)
    except RunError as error:
        return Check(subject, "wrong", str(error))
    if path.name != f"round-{found.adapter.round:04d}.safetensors":
        return Check(subject, "wrong", f"it holds the state after round {found.adapter.round}")
    return Check(subject, "ok", "it has the digest that lies beside it")


def _checkpoints(folder: Path, lines: Sequence[Line], last: int, over: bool) -> Iterator[Check]:
    saved = {line["file"]: line for line in lines if line["kind"] == "checkpoint_saved"}
    resumed = {line.get("round") for line in lines if line["kind"] == "run_resumed"}
    paths = checkpoints(folder)
    for path in paths:
        own = _own_digest(path)
        if own.outcome == "wrong":
            yield own
        else:
            # Killed between saving a checkpoint and saying so, a run goes on from that one.
            newest = path == paths[-1] and not over
            yield _in_ledger(path, saved.get(path.name), newest or _round(path) in resumed)
    newest_round = _round(paths[-1]) if paths else 0
    allowed = (last,) if over else (last, last - 1)
    if not paths and last == 0:
        yield Check("checkpoints", "ok", "no round was joined yet")
    elif newest_round not in allowed:
        found = f"round {newest_round}" if paths else "none"
        yield Check("checkpoints", "wrong", f"expected one of round {last}, found {found}")
    else:
        yield Check("checkpoints", "ok", f"the last is of round {newest_round}, as in the ledger")


def _in_ledger(path: Path, line: Line | None, may_be_unsaid: bool) -> Check:
    subject, found = f"checkpoints/{path.name}", file_digest(path)
    if line is None:
        text = "it is whole, and the ledger does not name it"
        return Check(subject, "unproven" if may_be_unsaid else "wrong", text)
    expected = str(line["sha256"])
    if found != expected:
        return Check(subject, "wrong", f"expected sha256 {expected} of the ledger, found {found}")
    return Check(subject, "ok", f"sha256 {found[:16]}, as in the ledger")


def _round(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


# ---------------------------------------------------------------- exports


def _exports(folder: Path, lines: Sequence[Line]) -> Iterator[Check]:
    events = [line for line in lines if line["kind"] == "exported"]
    digests: Mapping[str, str] = (events[-1].get("digests") or {}) if events else {}
    for place in EXPORT_PLACES.values():
        files = {file.relative_to(folder).as_posix() for file in export_files(folder / place)}
        named = {name for name in digests if _belongs(name, place)}
        if files and not events:
            yield Check(place, "unproven", "the run has not said yet what it exported")
        elif files or named:
            yield _export(folder, place, files, {name: digests[name] for name in named})


def _belongs(name: str, place: str) -> bool:
    return name in (place, f"{place}.data") or name.startswith(f"{place}/")


def _export(folder: Path, place: str, files: set[str], named: Mapping[str, str]) -> Check:
    if not named:
        text = "the run did not write it; what `fedtune export` wrote later, --deep can prove"
        return Check(place, "wrong", f"expected none, found {_files(files)}: {text}")
    if missing := sorted(named.keys() - files):
        return Check(place, "wrong", f"expected {missing[0]}, found no such file")
    if strange := sorted(files - named.keys()):
        return Check(place, "wrong", f"{strange[0]} is not of the run: the ledger does not name it")
    for name, expected in sorted(named.items()):
        found = file_digest(folder / name)
        if found != expected:
            return Check(place, "wrong", f"{name}: expected sha256 {expected}, found {found}")
    return Check(place, "ok", f"{_files(named)}, each with the sha256 of the ledger")


def _files(names: Collection[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"
