"""`fedtune watch`: a run shown from its folder as the run itself shows it, and alarms."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.records import Event
from fedtune_server.folder_lock import FolderLock
from fedtune_server.ledger import Ledger

EVENTS = (
    Event("run_started", {"run": "told-1", "folder": "x", "rounds": 1, "devices": 1}),
    Event("round_started", {"round": 1, "devices": ["site-0"]}),
    Event("device_refused", {"round": 1, "device": "site-0", "reason": "too large"}),
    Event("round_finished", {"round": 1, "held_out_loss": 3.0, "dropped_energy": 0.5}),
    Event("run_finished", {"seconds": 2.0, "held_out_loss_after": 2.0}),
    Event("exported", {"paths": {"merged": "x/exports/merged"}}),
)


def write(folder: Path, *events: Event) -> None:
    folder.mkdir(exist_ok=True)
    with Ledger(folder / "ledger.jsonl") as ledger:
        for event in events:
            ledger(event)


def test_a_person_reads_the_events_and_the_alarms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    write(tmp_path / "run", *EVENTS)
    assert main(["watch", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0] == "run told-1: 1 rounds, 1 devices, folder x"
    assert "alarm: round 1: the only device refused; the last, site-0: too large" in lines
    assert any(line.startswith("alarm: round 1: the rank cap cut off 50.0%") for line in lines)
    assert "run told-1 finished in 2.0 s" in lines


def test_json_lines_are_the_events_of_the_run_and_the_alarms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", *EVENTS)
    assert main(["watch", str(tmp_path / "run"), "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each.get("alarm") or each["kind"] for each in told] == [
        "run_started", "round_started", "device_refused", "refused", "round_finished", "rank-cap",
        "run_finished", "exported",
    ]  # fmt: skip
    assert told[0] == {"kind": "run_started"} | dict(EVENTS[0].fields)


def test_a_run_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    later = threading.Timer(0.7, write, [folder, *EVENTS])
    later.start()
    assert main(["watch", str(folder), "--json"]) == 0
    later.join()
    shown = capsys.readouterr()
    assert shown.err == f"waiting for a run in {folder}\n"
    assert json.loads(shown.out.splitlines()[-1])["kind"] == "exported"


@pytest.mark.parametrize(
    "last", [Event("run_failed", {"reason": "disk full"}), Event("run_interrupted", {"round": 1})]
)
def test_a_run_that_did_not_finish_has_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: Event
) -> None:
    write(tmp_path / "run", *EVENTS[:4], last)
    assert main(["watch", str(tmp_path / "run")]) == 2
    words = "failed: disk full" if last.kind == "run_failed" else "interrupted in round 1"
    assert f"run told-1 {words}" in capsys.readouterr().out


def test_ctrl_c_ends_the_watch_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    write(folder, *EVENTS[:4])

    def interrupt(self: object, seconds: float) -> None:
        raise KeyboardInterrupt

    lock = FolderLock.acquire(folder)
    monkeypatch.setattr("fedtune.export.watching.RunWatch._wait", interrupt)
    assert main(["watch", str(folder)]) == 130
    lock.release()
    assert "run told-1 was not seen to end" in capsys.readouterr().out
