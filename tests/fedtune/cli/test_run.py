"""The operator's verbs against a desk on loopback whose Flower a test plays."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import coordinator as module
from fedtune.cli.logs import log_text
from fedtune.cli.main import main
from fedtune_server.desk.site_logs import SiteLogs
from fedtune_server.desk.view import SiteReport
from tests.fedtune_server.desk.office import (
    OPERATOR_TOKEN,
    Office,
    opened_office,
    until,
    write_ledger,
    write_status,
)

RUN_FILE = """
[run]
name = "demo"
rounds = 1
[model]
path = "org/base"
[data]
[deployment]
sites = ["north", "south"]
"""
EVENTS = (
    {"kind": "run_started", "run": "told-1", "folder": "x", "rounds": 1, "devices": 1},
    {"kind": "round_started", "round": 1, "devices": ["north"]},
    {"kind": "device_refused", "round": 1, "device": "north", "reason": "not at this hour"},
    {"kind": "round_finished", "round": 1, "held_out_loss": 3.0, "reported": 1},
    {"kind": "run_finished", "seconds": 2.0, "held_out_loss_after": 2.0},
)
FOR_SIMULATION = [
    word
    for key in ("deployment.sites=[]", "data.train=rows", "fleet.a.count=2", "fleet.a.memory=8 GB")
    for word in ("--set", key)
]
KINDS = [
    "run_started", "round_started", "device_refused", "alarm", "round_finished", "run_finished",
]  # fmt: skip


class At:
    """A folder with a run file and an operator file, and a desk to ask."""

    def __init__(self, folder: Path, office: Office) -> None:
        self.folder, self.office = folder, office
        self.run_file = folder / "run.toml"
        self.run_file.write_text(RUN_FILE)
        (folder / "operator.toml").write_text(
            f'server = "localhost:1"\nservice = "{office.address}"\ntoken = "{OPERATOR_TOKEN}"\n'
            'ca = "none"\n'
        )

    def do(self, *words: str) -> int:
        file = str(self.folder / "operator.toml")
        return main([*words, "--coordinator", file, "--insecure"])

    def play(self, state: str, *events: dict[str, Any]) -> threading.Thread:
        """Be the run's process: once it is started, write and end."""
        office = self.office

        def play() -> None:
            until(lambda: any(run.status != "finished" for run in office.flower.known.values()))
            write_ledger(office.folder("demo"), *events)
            write_status(office.folder("demo"), state, 1)
            office.flower.end(max(office.flower.known))

        thread = threading.Thread(target=play)
        thread.start()
        return thread


@pytest.fixture
def at(tmp_path: Path) -> Iterator[At]:
    with opened_office(tmp_path / "home") as office:
        yield At(tmp_path, office)


Captured = pytest.CaptureFixture[str]


def test_a_run_is_sent_and_shown_until_it_ends(at: At, capsys: Captured) -> None:
    thread = at.play("finished", *EVENTS)
    assert at.do("run", str(at.run_file)) == 0
    thread.join()
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "run told-1: 1 rounds, 1 devices, folder x"
    assert "warning: round 1, north refused: not at this hour" in shown.out
    assert "without TLS" in shown.err
    assert "run demo finished at round 1 of 1" in shown.err


def test_a_run_that_fails_says_why(at: At, capsys: Captured) -> None:
    thread = at.play("failed", {"kind": "run_failed", "reason": "too few devices reported"})
    assert at.do("run", str(at.run_file), "--json") == 2
    thread.join()
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[0])["kind"] == "run_failed"
    assert "run demo failed at round 1 of 1: too few devices reported" in shown.err


def test_ctrl_c_leaves_the_run_going(
    at: At, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "run_events", interrupted)
    assert at.do("run", str(at.run_file)) == 130
    assert "run demo goes on at the coordinator; follow it with: fedtune watch demo" in (
        capsys.readouterr().err
    )
    until(lambda: at.office.flower.started == ["demo"])


def test_who_follows_a_run_that_fails_reads_how_to_go_on(at: At, capsys: Captured) -> None:
    player = at.play("failed", EVENTS[0], {"kind": "run_failed", "reason": "too few sites"})
    assert at.do("run", str(at.run_file)) == 2
    player.join(10)
    shown = capsys.readouterr().out
    assert "fedtune resume demo" in shown
    assert "same command" not in shown


def test_a_detached_run_is_listed_stopped_and_resumed(at: At, capsys: Captured) -> None:
    assert at.do("run", str(at.run_file), "--detach", "--set", "run.rounds=7") == 0
    until(lambda: at.office.flower.started)
    capsys.readouterr()
    assert at.do("ps", "--json") == 0
    (listed,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (listed["name"], listed["rounds"], listed["sites"]) == ("demo", 7, ["north", "south"])
    assert at.do("ps") == 0
    assert "demo" in capsys.readouterr().out
    assert at.do("stop", "demo") == 0
    assert capsys.readouterr().out.startswith("run demo is stop")
    until(lambda: at.office.parts.desk.run("demo").state == "stopped")
    assert at.do("status", "demo") == 0
    assert "reason     the operator stopped it" in capsys.readouterr().out
    assert at.do("logs", "north") == 0
    assert "no lines of north came: a site sends them" in capsys.readouterr().err
    assert at.do("resume", "demo") == 0
    until(lambda: len(at.office.flower.started) == 2)


def test_a_run_elsewhere_is_watched_by_its_name(at: At, capsys: Captured) -> None:
    assert at.do("run", str(at.run_file), "-d") == 0
    thread = at.play("finished", *EVENTS)
    assert at.do("watch", "demo", "--json") == 0
    thread.join()
    kinds = [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()]
    assert kinds == KINDS


def test_a_name_of_no_folder_is_asked_at_the_coordinator_of_the_environment(
    at: At, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(at.folder)
    monkeypatch.setenv("FEDTUNE_OPERATOR", str(at.folder / "operator.toml"))
    at.do("run", str(at.run_file), "-d")
    capsys.readouterr()
    assert main(["status", "demo", "--json", "--insecure"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "demo"
    write_status(at.folder / "runs" / "demo", "finished", 1)
    write_ledger(at.folder / "runs" / "demo", *EVENTS)
    assert main(["status", "demo"]) == 0  # what is here goes first
    assert "told-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "other"], "error: no run is called 'other' here; fedtune ps lists the runs"),
        (["watch", "other"], "error: no run is called 'other' here"),
        (["stop", "other"], "error: no run is called 'other' here"),
        (["resume", "../x"], "error: no run is called '../x' here"),
        (["logs", "east"], "error: no site is called 'east' here; known: north, south"),
        (["run", "RUN", "--set", 'deployment.sites=["nort"]'], "site nort is not known"),
        (["run", "RUN", *FOR_SIMULATION], "has no deployment.sites"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    at: At, capsys: Captured, words: list[str], said: str
) -> None:
    words = [str(at.run_file) if word == "RUN" else word for word in words]
    assert at.do(*words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert said in errors[0]


def test_no_coordinator_is_said(tmp_path: Path, capsys: Captured) -> None:
    assert main(["ps", "--coordinator", str(tmp_path / "none.toml")]) == 2
    assert "operator file" in capsys.readouterr().err


def test_a_coordinator_that_does_not_answer_is_said(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "operator.toml"
    file.write_text('server = "localhost:1"\nservice = "localhost:1"\ntoken = "t"\nca = "none"\n')
    assert main(["ps", "--coordinator", str(file), "--insecure"]) == 2
    assert "the coordinator at localhost:1 does not answer" in capsys.readouterr().err


def test_a_sites_log_is_shown(at: At, capsys: Captured) -> None:
    logs = SiteLogs(at.office.parts.home.logs / "sites")
    time = "2026-11-27T17:09:55.972Z"
    said = [
        json.dumps({"time": time, "level": level, "process": "node", "message": "step 3"})
        for level in ("info", "warning")
    ]
    logs.keep("north", [*said, "plain"])
    assert at.do("logs", "north", "-n", "5") == 0
    assert capsys.readouterr().out.splitlines() == [
        "2026-11-27 17:09:55 node step 3",
        "2026-11-27 17:09:55 warning node step 3",
        "plain",
    ]


def test_the_status_of_a_run_says_what_its_sites_refuse(at: At, capsys: Captured) -> None:
    at.office.parts.desk._presence.hear(
        "north", SiteReport(state="refusing", last_refusal="at night")
    )
    assert at.do("run", str(at.run_file), "-d") == 0
    capsys.readouterr()
    assert at.do("status", "demo") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  north: offline, last seen 20") for line in lines)
    assert lines[-2].endswith("; last refusal: at night")
    assert lines[-1] == "  south: offline"
    assert at.do("status", "demo", "--json") == 0
    north, south = json.loads(capsys.readouterr().out)["site_states"]
    assert (north["last_refusal"], south["online"]) == ("at night", False)


def test_a_log_line_cannot_act_on_a_terminal() -> None:
    assert log_text('{"message": "\\u001b[2Jgone\\r\\nnext"}') == "[2Jgone  next"
    assert log_text("[" * 100_000).startswith("[[")


def test_a_desk_that_restarts_is_asked_again(tmp_path: Path, capsys: Captured) -> None:
    """The desk ends in the middle of a watch and comes back on its port."""
    with opened_office(tmp_path / "home") as office:
        port = int(office.address.rpartition(":")[2])
        at = At(tmp_path, office)
        assert at.do("run", str(at.run_file), "-d") == 0
        until(lambda: office.flower.started)
        write_ledger(office.folder("demo"), *EVENTS[:3])
        codes: list[int] = []
        watching = threading.Thread(target=lambda: codes.append(at.do("watch", "demo", "--json")))
        watching.start()
        heard: list[str] = []
        said: list[str] = []

        def hear(kind: str) -> Callable[[], bool]:
            def true() -> bool:
                found = capsys.readouterr()
                heard.extend(found.out.splitlines())
                said.append(found.err)
                return any(json.loads(line)["kind"] == kind for line in heard)

            return true

        until(hear("alarm"))
    with opened_office(tmp_path / "home", port=port) as office:
        until(lambda: office.flower.started)  # its Flower lost the run
        write_ledger(office.folder("demo"), *EVENTS[3:])
        write_status(office.folder("demo"), "finished", 1)
        office.flower.end(max(office.flower.known))
        watching.join(30)
        until(hear("run_finished"))
    assert codes == [0]
    kinds = [json.loads(line)["kind"] for line in heard]
    assert kinds == KINDS
    assert "does not answer" in "".join(said)


@pytest.mark.parametrize("verb", ["status", "watch"])
def test_a_run_here_is_shown_and_the_other_named(
    verb: str, at: At, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have a run `demo`: a line says which is shown, and how to see the other."""
    monkeypatch.chdir(at.folder)
    monkeypatch.setenv("FEDTUNE_OPERATOR", str(at.folder / "operator.toml"))
    write_ledger(at.folder / "runs" / "demo", {"seq": 0, "time": "", **EVENTS[0]}, EVENTS[-1])
    main([verb, "demo"])
    shown = capsys.readouterr()
    assert "runs/demo on this machine" in shown.err.replace("\\", "/")
    assert "--coordinator FILE" in shown.err
    main([verb, str(at.folder / "runs" / "demo")])
    assert "on this machine" not in capsys.readouterr().err


def test_a_path_is_never_asked_of_a_coordinator(
    at: At, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_OPERATOR", str(at.folder / "operator.toml"))
    assert main(["status", str(at.folder / "nothing")]) == 2
    assert "no run is at" in capsys.readouterr().err
