"""Whether a run folder holds what its ledger says: chain, plan, checkpoints and exports.

Everything rests on the ledger: its chain is checked first, and what it names is compared with what
lies in the folder. That proves the folder against accidents and careless editing. Who can rewrite
all of it, with a new chain, is not found out: keep the last line's `hash` elsewhere for that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.errors import PlanError, RunError
from fedtune.export.ledger_facts import Line, gather
from fedtune.export.plan_check import plan_difference
from fedtune.export.run_settings import json_object
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

    A run that goes on may be checked, too: what grows is read before the ledger, which then has
    all that it needs to say of it.

    Source: design.md, section 7.
    """
    status = json_object(folder / "status.json")
    saved = [_saved(path) for path in checkpoints(folder / "checkpoints")]
    # A run that goes on removes its oldest checkpoint when it has a new one.
    saved = [each for each in saved if each.path.exists()]
    try:
        lines, torn = verify_whole_lines(folder / "ledger.jsonl")
        if not lines:
            raise RunError(f"{folder / 'ledger.jsonl'}: expected a line per event, found none")
    except RunError as error:
        yield Check("ledger", "wrong", str(error))
        # What the ledger would say of the rest is not known: only digests beside files are left.
        yield from (_own_digest(each) for each in saved)
        return
    yield _chain(lines, torn)
    facts = gather(lines)
    over = facts.status == "finished" and any(line["kind"] == "exported" for line in lines)
    last = max(facts.rounds, default=0)
    yield _status(status, last, over)
    yield _config(json_object(folder / "config.json"), lines)
    yield _plan(folder / "plan.json", facts.plans)
    yield from _checkpoints(saved, lines, last, over)
    yield from _exports(folder, lines)


# ---------------------------------------------------------------- the ledger and what it began with


def _chain(lines: Sequence[Line], torn: bool) -> Check:
    words = f"{len(lines)} lines, each chained to the one before; the last has hash "
    words += f"{str(lines[-1]['hash'])[:16]}"
    if torn and lines[-1]["kind"] == "exported":
        return Check("ledger", "wrong", f"{words}, and after the run's last line comes a half one")
    rest = "; half a line follows, as it is written or as a killed run left it" if torn else ""
    return Check("ledger", "ok", words + rest)


def _status(status: Mapping[str, Any], last: int, over: bool) -> Check:
    state, round = status.get("state"), status.get("round")
    if not isinstance(state, str) or not isinstance(round, int):
        return Check("status.json", "wrong", "expected a state and a round, found no such file")
    if over and state not in ("finished", "running"):
        return Check("status.json", "wrong", f"expected the state finished, found {state}")
    if state == "finished" and not over:
        return Check("status.json", "wrong", "it says finished, and the ledger does not")
    if round > last or (state == "finished" and round != last):
        return Check("status.json", "wrong", f"expected round {last}, found {round}")
    return Check("status.json", "ok", f"{state} at round {round}, as the ledger has it")


def _config(config: Mapping[str, Any], lines: Sequence[Line]) -> Check:
    """The settings that the ledger repeats; of a continued run, as they were then."""
    try:
        found = {
            "rounds": config["run"]["rounds"],
            "seed": config["run"]["seed"],
            "rule": config["aggregate"]["rule"],
        }
    except (KeyError, TypeError):
        return Check("config.json", "wrong", "expected the run's settings, found no such file")
    told: dict[str, Any] = {}  # a run may be continued for more rounds than it began with
    for line in lines:
        if line["kind"] in ("run_started", "run_resumed"):
            told |= {key: line[key] for key in found if key in line}
    for key, expected in told.items():
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


@dataclass(frozen=True, slots=True)
class _Saved:
    """A checkpoint as it lies in the folder.

    Attributes:
        sha256: of the file; empty if it cannot be read.
        trouble: what is wrong with it, whatever the ledger says; empty if nothing.
    """

    path: Path
    sha256: str
    trouble: str

    @property
    def subject(self) -> str:
        """What it is called in a check."""
        return f"checkpoints/{self.path.name}"

    @property
    def round(self) -> int:
        """The round that its name says."""
        return int(self.path.stem.removeprefix("round-"))


def _saved(path: Path) -> _Saved:
    try:
        round = read_checkpoint(path).adapter.round
        sha256 = file_digest(path)
    except (RunError, OSError) as error:
        return _Saved(path, "", str(error))
    found = _Saved(path, sha256, "")
    return found if found.round == round else _Saved(path, sha256, f"it holds round {round}")


def _own_digest(saved: _Saved) -> Check:
    """A checkpoint against the digest that lies beside it."""
    if saved.trouble:
        return Check(saved.subject, "wrong", saved.trouble)
    return Check(saved.subject, "ok", "it has the digest that lies beside it")


def _checkpoints(
    saved: Sequence[_Saved], lines: Sequence[Line], last: int, over: bool
) -> Iterator[Check]:
    told = {line["file"]: line for line in lines if line["kind"] == "checkpoint_saved"}
    resumed = {line.get("round") for line in lines if line["kind"] == "run_resumed"}
    for each in saved:
        # Killed between saving a checkpoint and saying so, a run goes on from that one.
        newest = each is saved[-1] and not over
        yield _in_ledger(each, told.get(each.path.name), newest or each.round in resumed)
    newest_round = saved[-1].round if saved else 0
    if not saved and last > 0:
        yield Check("checkpoints", "wrong", f"expected one of round {last}, found none")
    elif newest_round not in ((last,) if over else (last, last - 1)):
        text = f"expected one of round {last}, found round {newest_round}"
        yield Check("checkpoints", "wrong", text)
    elif saved:
        yield Check("checkpoints", "ok", f"the last is of round {newest_round}, as in the ledger")
    else:
        yield Check("checkpoints", "ok", "no round was joined yet")


def _in_ledger(saved: _Saved, line: Line | None, may_be_unsaid: bool) -> Check:
    if saved.trouble:
        return Check(saved.subject, "wrong", saved.trouble)
    if line is None:
        text = "it is whole, and the ledger does not name it"
        return Check(saved.subject, "unproven" if may_be_unsaid else "wrong", text)
    expected = str(line["sha256"])
    if saved.sha256 != expected:
        text = f"expected sha256 {expected} of the ledger, found {saved.sha256}"
        return Check(saved.subject, "wrong", text)
    return Check(saved.subject, "ok", f"sha256 {expected[:16]}, as in the ledger")


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
