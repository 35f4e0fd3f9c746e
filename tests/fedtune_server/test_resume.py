"""A run that stops at any point goes on where it was, with devices that compute nothing."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune.errors import RoundError, RunError
from fedtune.export.ledger_facts import read_ledger
from fedtune.records import DeviceProfile, Event
from fedtune.wire import durable
from fedtune.wire.events import plain
from fedtune.wire.ledger_chain import verify_ledger
from fedtune_server.run_folder import RunFolder
from fedtune_server.simulation import simulate

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
Tree = dict[str, dict[str, Any]]
ROUNDS = 4


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


class Runs:
    """Starts a run of a fake fleet in one folder, again and again."""

    def __init__(self, fleet_of: FleetOf, tmp_path: Path) -> None:
        self._fleet_of = fleet_of
        self.tree: Tree = {
            "run": {"name": "unit", "rounds": ROUNDS, "round_deadline_s": 30.0},
            "model": {"path": "not/read/here"},
            "data": {"train": "not-read.jsonl", "max_tokens": 16},
            "fleet": {"any": {"count": 3, "memory": "1 GB"}},
            "lora": {"rank_max": 3, "rank_cap": 6},
            "train": {"batch_size": 4, "local_steps": 3},
            "importance": {"method": "uniform"},
            "aggregate": {"momentum": 0.5},
            "outputs": {"folder": str(tmp_path / "run")},
        }
        self.folder = tmp_path / "run"
        self.finish: Callable[[Path, Callable[[Event], None]], None] = _no_exports
        self.fake = fleet_of("a", "b", "c")

    def start(
        self,
        changes: Tree | None = None,
        spoil: Callable[[Any], None] | None = None,
        overwrite: bool = False,
    ) -> list[Event]:
        """Play what is left of the run; its events."""
        tree = copy.deepcopy(self.tree)
        for section, fields in (changes or {}).items():
            tree.setdefault(section, {}).update(fields)
        self.fake = self._fleet_of("a", "b", "c")
        if spoil is not None:
            spoil(self.fake)
        events: list[Event] = []
        simulate(
            parse_run_config(tree, "test"),
            self.fake._app(),
            self.fake.shapes,
            3,
            watch=events.append,
            finish=lambda folder, emit: self.finish(folder, emit),
            overwrite=overwrite,
        )
        return events

    def asked(self) -> list[tuple[int, str]]:
        """Rounds and devices that were asked since the last start, in order."""
        return [(order.round, order.plan.device) for order in self.fake.orders]

    def checkpoint(self, round: int = ROUNDS) -> Path:
        return self.folder / "checkpoints" / f"round-{round:04d}.safetensors"


def _no_exports(folder: Path, emit: Callable[[Event], None]) -> None:
    emit(Event("exported", {"paths": {}, "skipped": {}}))


@pytest.fixture
def runs(fleet_of: FleetOf, tmp_path: Path) -> Runs:
    return Runs(fleet_of, tmp_path)


@pytest.fixture
def whole(fleet_of: FleetOf, tmp_path: Path) -> bytes:
    """The last checkpoint of the run that nothing interrupts."""
    runs = Runs(fleet_of, tmp_path / "whole")
    runs.start()
    return runs.checkpoint().read_bytes()


def dies(round: int, device: str) -> Callable[[Any], None]:
    """A device at whose answer the coordinator's process ends."""

    def spoil(fake: Any) -> None:
        def end(said: Any, tensors: bytes) -> Any:
            if said.round == round:
                raise Killed
            return said, tensors

        fake.spoil[device] = end

    return spoil


def kinds(events: list[Event]) -> Counter[str]:
    return Counter(event.kind for event in events)


def only(events: list[Event], kind: str) -> dict[str, Any]:
    (fields,) = (event.fields for event in events if event.kind == kind)
    return dict(fields)


def test_answers_of_the_open_round_count_and_their_devices_are_not_asked_again(
    runs: Runs, whole: bytes
) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(3, "b"))
    assert runs.asked()[-2:] == [(3, "a"), (3, "b")]
    events = runs.start()
    assert runs.asked()[:3] == [(3, "b"), (3, "c"), (4, "a")]
    assert only(events, "run_resumed") == {
        "run": only(events, "run_resumed")["run"],
        "folder": str(runs.folder),
        "round": 2,
        "rounds": ROUNDS,
        "devices": 3,
        "skipped": 0,
        "versions": only(events, "run_resumed")["versions"],
    }
    assert kinds(events)["planned"] == kinds(events)["run_started"] == 0
    assert kinds(events)["device_reported"] == 6
    started = next(i for i, event in enumerate(events) if event.kind == "round_started")
    assert [e.fields.get("device") for e in events[started + 1 : started + 4]] == ["a", "b", "c"]
    uploads = [e.fields["upload_bytes"] for e in events if e.kind == "round_finished"]
    assert uploads[0] == uploads[1] > 0
    assert runs.checkpoint().read_bytes() == whole
    assert RunFolder(runs.folder).read_status().state == "finished"
    assert not any((runs.folder / "open").iterdir())


def test_an_answer_on_the_disk_is_checked_like_one_that_comes_now(runs: Runs, whole: bytes) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(3, "c"))
    bodies = sorted((runs.folder / "open" / "round-0003").glob("*.tensors"))
    content = bytearray(bodies[0].read_bytes())
    content[-1] ^= 1
    bodies[0].write_bytes(content)
    bodies[1].unlink()
    runs.start()
    assert runs.asked()[:3] == [(3, "a"), (3, "b"), (3, "c")]
    assert runs.checkpoint().read_bytes() == whole


def test_whom_the_open_round_asked_is_asked_again_and_nobody_else(runs: Runs) -> None:
    """A draw follows from the seed, the round and the turns that were saved."""
    sampled: Tree = {"run": {"devices_per_round": 2}}
    with pytest.raises(Killed):
        runs.start(sampled, dies(1, "c"))
    first = {device for _, device in runs.asked()}
    events = runs.start(sampled)
    again = next(e for e in events if e.kind == "round_started").fields["devices"]
    assert set(again) == first
    assert runs.asked()[0] == (1, "c")  # the other's answer was kept
    assert runs.asked()[1][0] == 2


def _writes_until_the_end(runs: Runs, monkeypatch: pytest.MonkeyPatch, last: int) -> int:
    """Start a run whose process ends at its n-th flush or rename; how many there were."""
    count = 0

    def ending(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > last:
                raise Killed
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "replace", ending(os.replace))
        patch.setattr(durable.os, "fsync", ending(os.fsync))
        try:
            runs.start()
        except Killed:
            return count
    return count


def test_a_process_may_end_at_any_write(
    fleet_of: FleetOf, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Runs(fleet_of, tmp_path / "counted")
    writes = _writes_until_the_end(counted, monkeypatch, 10**9)
    assert writes > 60
    for last in range(0, writes, 11):
        runs = Runs(fleet_of, tmp_path / str(last))
        assert _writes_until_the_end(runs, monkeypatch, last) > last
        runs.start()
        assert runs.checkpoint().read_bytes() == whole, f"write {last} of {writes}"
        verify_ledger(runs.folder / "ledger.jsonl")


def test_a_process_may_end_again_and_again(
    runs: Runs, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start gets a few writes further than it needs to stand where the last one did."""
    starts = 0
    while not runs.checkpoint().exists():
        _writes_until_the_end(runs, monkeypatch, 23)
        starts += 1
        assert starts < 30
    assert starts > 3
    runs.start()
    assert runs.checkpoint().read_bytes() == whole
    rounds = [
        (line["kind"], line["round"], line.get("device"))
        for line in map(json.loads, (runs.folder / "metrics.jsonl").read_text("utf-8").splitlines())
    ]
    assert max(Counter(rounds).values()) == 1
    assert [each for each in rounds if each[0] == "round_finished"] == [
        ("round_finished", round, None) for round in range(1, ROUNDS + 1)
    ]
    facts = read_ledger(runs.folder / "ledger.jsonl")
    assert sorted(facts.rounds) == [1, 2, 3, 4]
    assert facts.status == "finished"
    assert facts.refusals == {}
    names = {line["run"] for line in verify_ledger(runs.folder / "ledger.jsonl") if "run" in line}
    assert len(names) == 1


@pytest.mark.parametrize("harm", ["cut", "changed", "digest"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(
    runs: Runs, whole: bytes, harm: str
) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(4, "b"))
    path = runs.checkpoint(3)
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.with_name(path.name + ".sha256").unlink()
    events = runs.start()
    resumed = only(events, "run_resumed")
    assert (resumed["round"], resumed["skipped"]) == (2, 1)
    warning = only(events, "warning")["text"]
    assert "round-0003.safetensors" in warning
    assert "the one before" in warning
    assert path.with_name(path.name + ".damaged").exists()
    # The answers of round 4 began from a round 3 that is not at hand any more.
    assert runs.asked() == [(round, name) for round in (3, 4) for name in "abc"]
    assert runs.checkpoint().read_bytes() == whole


def test_if_no_checkpoint_is_whole_the_run_does_not_start_over_unasked(runs: Runs) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(4, "b"))
    for path in (runs.folder / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole; .*start anew with --over"):
        runs.start()
    assert runs.asked() == []


def test_only_the_exports_are_left_to_do(runs: Runs) -> None:
    def end(folder: Path, emit: Callable[[Event], None]) -> None:
        raise Killed

    runs.finish = end
    with pytest.raises(Killed):
        runs.start()
    runs.finish = _no_exports
    events = runs.start()
    assert [event.kind for event in events] == ["run_resumed", "exported"]
    assert read_ledger(runs.folder / "ledger.jsonl").status == "finished"
    with pytest.raises(RunError, match=r"already holds a run \(finished at round 4\); raise run.r"):
        runs.start()


def test_a_finished_run_goes_on_when_it_gets_more_rounds(runs: Runs, whole: bytes) -> None:
    runs.start({"run": {"rounds": 2}})
    events = runs.start()
    assert only(events, "run_resumed")["round"] == 2
    assert runs.checkpoint().read_bytes() == whole
    config = json.loads((runs.folder / "config.json").read_text(encoding="utf-8"))
    assert config["run"]["rounds"] == ROUNDS
    with pytest.raises(RunError, match=r"finished at round 4\), more than run.rounds = 3; raise"):
        runs.start({"run": {"rounds": 3}})


def test_more_rounds_move_the_line_of_the_learning_rate_and_a_warning_says_so(runs: Runs) -> None:
    runs.tree["train"]["schedule"] = "linear"
    runs.start({"run": {"rounds": 2}})
    assert only(runs.start(), "warning")["text"] == (
        "run.rounds was 2 and is 4: from here on the learning rate is that of a linear schedule of "
        "4 rounds"
    )


def test_another_configuration_is_another_run(runs: Runs) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(3, "b"))
    with pytest.raises(
        RunError,
        match=r"already holds a run \(failed at round 2\) with lora.rank_max = 3, this command has "
        r"2; undo the change to continue it, .*--overwrite",
    ):
        runs.start({"lora": {"rank_max": 2}})
    patient: Tree = {"run": {"round_deadline_s": 60.0}, "outputs": {"keep_checkpoints": 9}}
    assert only(runs.start(patient), "run_resumed")["round"] == 2


def test_overwriting_starts_anew(runs: Runs) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(3, "b"))
    events = runs.start({"run": {"seed": 7}}, overwrite=True)
    assert kinds(events)["run_started"] == 1
    assert len(runs.asked()) == 3 * ROUNDS


def test_a_device_that_does_not_come_back_is_missed_and_the_run_goes_on(runs: Runs) -> None:
    with pytest.raises(Killed):
        runs.start(spoil=dies(3, "b"))

    def gone(fake: Any) -> None:
        fake.change("c", base_digest="e" * 64)
        fake.change("a", train_samples=99)

    events = runs.start(spoil=gone)
    reasons = {e.fields["reason"] for e in events if e.kind == "site_excluded"}
    assert any("holds another base model" in reason for reason in reasons)
    assert "c did not come back; the run goes on without it" in reasons
    assert only(events, "warning")["text"].startswith("the data of a changed while the run was")
    assert {device for _, device in runs.asked()} == {"a", "b"}


def test_a_run_that_failed_goes_on_with_the_same_command(runs: Runs, whole: bytes) -> None:
    """Its last word is a failed round, and the round is played again when the devices are back."""
    runs.tree["run"]["minimum_devices"] = 3

    def spoil(fake: Any) -> None:
        def refuse(said: Any, tensors: bytes) -> Any:
            return said, tensors if said.round != 3 else tensors[:-4]

        fake.spoil["b"] = refuse

    with pytest.raises(RoundError, match="round 3 needs updates of 3 devices"):
        runs.start(spoil=spoil)
    assert RunFolder(runs.folder).read_status().state == "failed"
    runs.start()
    assert runs.asked()[0] == (3, "b")
    assert runs.checkpoint().read_bytes() == whole


# ---------------------------------------------------------------- what the plan rests on


def _slow(fake: Any, name: str, factor: float) -> None:
    """Let all devices have rates, and one be slower than they say."""
    for each in fake.names:
        rates = {"matmul_flops_per_s": {"fp32": 1e6}, "memory_bandwidth_bytes_per_s": 1e9}
        fake.change(each, profile=DeviceProfile(each, "any", 1, 60_000, **rates))

    def add(said: Any, tensors: bytes) -> Any:
        return replace(said, metrics={**said.metrics, "step_seconds": factor * 0.32}), tensors

    fake.spoil[name] = add


def test_a_device_that_drifts_is_planned_anew_in_the_same_round_with_an_interruption(
    fleet_of: FleetOf, tmp_path: Path
) -> None:
    """What two rounds in a row must agree on is known after the process has ended between them."""
    plan: Tree = {
        "plan": {"round_seconds": 4.0, "steps": "equal"},
        "train": {"local_steps": 10, "evaluate_every": 0},
    }
    whole, runs = (Runs(fleet_of, tmp_path / name) for name in ("whole", "killed"))
    expected = only(whole.start(plan, lambda fake: _slow(fake, "b", 3.0)), "replanned")
    assert (expected["round"], expected["device"]) == (2, "b")
    for round in (2, 3):  # once while it is still watched, once after it was planned anew

        def spoil(fake: Any, round: int = round) -> None:
            _slow(fake, "b", 3.0)
            dies(round, "c")(fake)

        with pytest.raises(Killed):
            runs.start(plan, spoil)
    runs.start(plan, lambda fake: _slow(fake, "b", 3.0))
    told = [
        {key: line[key] for key in expected}
        for line in verify_ledger(runs.folder / "ledger.jsonl")
        if line["kind"] == "replanned"
    ]
    assert told == [plain(expected)]
    assert runs.checkpoint().read_bytes() == whole.checkpoint().read_bytes()


def test_the_importance_that_the_plan_was_made_with_must_still_be_there(runs: Runs) -> None:
    drawn: Tree = {"importance": {"method": "random"}}
    with pytest.raises(Killed):
        runs.start(drawn, dies(2, "b"))
    path = runs.folder / "importance.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("0.", "0.1", 1), encoding="utf-8")
    with pytest.raises(RunError, match=r"importance.json is not the one that the run was planned"):
        runs.start(drawn)
    path.write_text(text, encoding="utf-8")
    assert only(runs.start(drawn), "run_resumed")["round"] == 1


# ---------------------------------------------------------------- disks that do not take it


def _full_after(calls: int, name: str) -> Callable[..., Any]:
    real, count = getattr(os, name), 0

    def call(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    return call


@pytest.mark.parametrize("calls", [9, 14, 31, 48])
def test_a_full_disk_is_one_line_that_names_the_file_and_nothing_is_lost(
    runs: Runs, whole: bytes, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", _full_after(calls, "fsync"))
        with pytest.raises(RunError, match=r"cannot be written \(No space left.*free some space"):
            runs.start()
    assert not list(runs.folder.rglob("*.partial"))
    verify_ledger(runs.folder / "ledger.jsonl")
    runs.start()
    assert runs.checkpoint().read_bytes() == whole


def test_a_disk_that_is_too_small_for_the_exports_keeps_the_run(runs: Runs) -> None:
    def full(folder: Path, emit: Callable[[Event], None]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runs.finish = full
    with pytest.raises(RunError, match=r"exports cannot be written \(No space left.*free some sp"):
        runs.start()
    runs.finish = _no_exports
    assert [event.kind for event in runs.start()] == ["run_resumed", "exported"]


def test_a_second_coordinator_is_refused_and_the_first_loses_nothing(runs: Runs) -> None:
    tried: list[str] = []

    def spoil(fake: Any) -> None:
        def meanwhile(said: Any, tensors: bytes) -> Any:
            with pytest.raises(RunError, match="is in use by another coordinator") as refused:
                RunFolder.enter(runs.folder, parse_run_config(runs.tree, "test"))
            tried.append(str(refused.value))
            return said, tensors

        fake.spoil["b"] = meanwhile

    events = runs.start(spoil=spoil)
    assert len(tried) == ROUNDS
    assert kinds(events)["round_finished"] == ROUNDS


def test_a_folder_that_cannot_be_written_is_one_line(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*arguments: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(durable.os, "replace", read_only)
    with pytest.raises(RunError, match=r"config.json cannot be written \(Read-only.*writable"):
        runs.start()
