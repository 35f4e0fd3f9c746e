"""The supervisor's decisions, with small real processes, in a thread of this process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtune.deploy.back_off import Waits
from fedtune.deploy.journal import Journal
from fedtune.deploy.keeper import Child, Patience
from fedtune.deploy.supervisor import Report, Supervisor, status_words
from tests.processes import wait_for

QUICK = Waits(first_s=0.02, longest_s=0.05)
SLEEP = "import time; time.sleep(60)"


def child(name: str, program: str, **more: object) -> Child:
    return Child(name, (sys.executable, "-I", "-S", "-c", program), **more)  # type: ignore[arg-type]


class Running:
    def __init__(self, supervisor: Supervisor, folder: Path) -> None:
        self.supervisor = supervisor
        self.folder = folder
        self.reports: list[Report] = []
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.code = self.supervisor.run()

    def states(self) -> dict[str, str]:
        return {child.name: child.state for child in self.supervisor.report.children}

    def of(self, name: str):  # type: ignore[no-untyped-def]
        return next(c for c in self.supervisor.report.children if c.name == name)

    def log(self, name: str) -> list[dict[str, object]]:
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        return [json.loads(line) for line in lines]


@contextmanager
def supervising(
    folder: Path, *children: Child, waits: Waits = QUICK, patience: Patience | None = None
) -> Iterator[Running]:
    journal = Journal(folder)
    reports: list[Report] = []
    supervisor = Supervisor(
        children,
        journal,
        waits=waits,
        patience=patience or Patience(grace_s=1.0, tick_s=0.02),
        watch=reports.append,
    )
    running = Running(supervisor, folder)
    running.reports = reports
    running.thread.start()
    try:
        yield running
    finally:
        supervisor.ask_to_stop()
        running.thread.join(10)
        journal.close()
        assert not running.thread.is_alive()


def test_a_process_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with supervising(tmp_path, child("link", SLEEP)) as running:
        first = wait_for(lambda: running.of("link").pid, 5, "it runs")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: running.of("link").pid not in (None, first), 5, "it runs again")
        assert running.of("link").restarts == 1
        assert running.of("link").last_exit == -9
    assert running.code == 0
    messages = [str(entry["message"]) for entry in running.log("supervisor")]
    assert any("link ended with signal SIGKILL; started again in" in m for m in messages)


def test_a_crash_loop_is_seen_and_never_given_up(tmp_path: Path) -> None:
    with supervising(tmp_path, child("desk", "raise ValueError('bad day')")) as running:
        wait_for(lambda: running.of("desk").restarts >= 7, 10, "seven restarts")
        assert running.of("desk").crash_loop
        assert running.supervisor.report.state == "failing"
        assert running.of("desk").last_error == "ValueError: bad day"


def test_exit_78_is_not_started_again_and_says_why(tmp_path: Path) -> None:
    program = "import sys; print('the site is revoked'); sys.exit(78)"
    with supervising(tmp_path, child("node", program), child("other", SLEEP)) as running:
        wait_for(lambda: running.states()["node"] == "refused", 5, "it is refused")
        time.sleep(0.3)
        assert running.of("node").restarts == 0
        assert running.of("node").last_error == "the site is revoked"
        assert running.states()["other"] == "up"
        assert running.supervisor.report.state == "failing"
    messages = [str(entry["message"]) for entry in running.log("supervisor")]
    assert "node is not started again: the site is revoked" in messages


@pytest.mark.parametrize("more", [{}, {"essential": True}])
def test_a_refusal_of_what_is_essential_or_of_all_ends_the_supervisor_with_78(
    tmp_path: Path, more: dict[str, bool]
) -> None:
    refusing = child("node", "import sys; sys.exit(78)", **more)
    others = [child("executor", SLEEP)] if more else []
    with supervising(tmp_path, refusing, *others) as running:
        running.thread.join(5)
        assert running.code == 78


def test_exit_75_waits_and_starts_again_and_is_no_crash_loop(tmp_path: Path) -> None:
    with supervising(tmp_path, child("node", "import sys; sys.exit(75)")) as running:
        wait_for(lambda: running.of("node").restarts >= 6, 10, "six restarts")
        assert not running.of("node").crash_loop


def test_an_exit_with_0_ends_what_is_restarted_on_failure_only(tmp_path: Path) -> None:
    once = child("once", "pass", restart="failure")
    with supervising(tmp_path, once, child("always", "pass")) as running:
        wait_for(lambda: running.of("always").restarts >= 2, 5, "two restarts")
        assert running.states()["once"] == "ended"
        assert running.of("once").restarts == 0


def test_a_child_waits_for_those_before_it(tmp_path: Path) -> None:
    ready = threading.Event()
    link = child("link", SLEEP, answers=ready.is_set)
    with supervising(tmp_path, link, child("runner", SLEEP, after=("link",))) as running:
        wait_for(lambda: running.states()["link"] == "starting", 5, "link starts")
        time.sleep(0.3)
        assert running.states() == {"link": "starting", "runner": "waiting"}
        assert running.supervisor.report.state == "starting"
        ready.set()
        wait_for(lambda: running.supervisor.report.state == "healthy", 5, "all are up")


def test_a_link_that_fails_before_it_was_up_lets_nothing_start(tmp_path: Path) -> None:
    def answers() -> bool:
        raise ConnectionRefusedError

    link = child("link", "import sys; sys.exit(1)", answers=answers)
    with supervising(tmp_path, link, child("runner", SLEEP, after=("link",))) as running:
        wait_for(lambda: running.of("link").restarts >= 3, 5, "three restarts")
        assert running.states()["runner"] == "waiting"


def test_a_process_that_no_longer_answers_is_killed_and_started_again(tmp_path: Path) -> None:
    answering = threading.Event()
    answering.set()
    patience = Patience(
        grace_s=1, tick_s=0.02, silent_s=0.2, hung_s=0.6, often_s=0.02, seldom_s=0.02
    )
    link = child("link", SLEEP, answers=answering.is_set)
    with supervising(tmp_path, link, patience=patience) as running:
        first = wait_for(lambda: running.states()["link"] == "up" and running.of("link").pid, 5, "")
        answering.clear()
        wait_for(lambda: running.states()["link"] == "silent", 5, "it is called silent")
        assert running.supervisor.report.state == "degraded"
        wait_for(lambda: running.of("link").pid not in (None, first), 5, "another one runs")
        assert running.of("link").last_exit == -9
        answering.set()
        wait_for(lambda: running.supervisor.report.state == "healthy", 5, "healthy again")


def test_what_a_dead_process_left_in_its_group_is_killed_before_the_next_start(
    tmp_path: Path,
) -> None:
    program = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    with supervising(tmp_path, child("runner", program)) as running:
        wait_for(lambda: (tmp_path / "runner.log").exists(), 5, "it wrote")
        below = int(str(running.log("runner")[0]["message"]))
        os.kill(running.of("runner").pid, signal.SIGKILL)
        wait_for(lambda: running.of("runner").restarts == 1, 5, "it runs again")
        assert _is_gone(below)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_program_that_is_not_there_is_a_failure_that_is_told(tmp_path: Path) -> None:
    with supervising(tmp_path, Child("link", ("/nowhere/program",))) as running:
        wait_for(lambda: running.of("link").restarts >= 2, 5, "two restarts")
        assert "/nowhere/program cannot be started" in running.of("link").last_error


def test_what_a_process_writes_is_kept_as_json_lines(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "print('plain \\u00e9 text', flush=True)\n"
        "sys.stderr.write('ERROR : it broke\\n')\n"
        'print(\'{"level": "warning", "message": "json", "process": "liar"}\', flush=True)\n'
        "sys.stdout.buffer.write(b'\\xff\\xfe\\n' + b'x' * 400_000 + b'\\nlast')\n"
        "sys.stdout.flush()\n"
        "time.sleep(60)"
    )
    with supervising(tmp_path, child("link", program)) as running:
        wait_for(lambda: len(_lines(tmp_path / "link.log")) >= 5, 5, "it wrote")
    entries = running.log("link")
    assert [(e["level"], e["message"]) for e in entries[:3]] == [
        ("info", "plain \u00e9 text"),
        ("error", "ERROR : it broke"),
        ("warning", "json"),
    ]
    assert {e["process"] for e in entries} == {"link"}
    assert entries[-1]["message"] == "last"
    assert all(len(str(e["message"])) <= 32_768 for e in entries)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_the_status_line_names_every_child(tmp_path: Path) -> None:
    with supervising(tmp_path, child("link", SLEEP), child("desk", SLEEP)) as running:
        wait_for(lambda: running.supervisor.report.state == "healthy", 5, "all are up")
        assert status_words(running.supervisor.report) == "healthy: link up, desk up"
    assert running.reports[-1].state == "stopped"
    assert {c.state for c in running.reports[-1].children} == {"stopped"}
