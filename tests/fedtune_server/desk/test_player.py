"""Which Flower runs are started, ended and started again for the runs that are wanted."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import DeploymentError, RunError
from fedtune_server.desk.player import Player
from fedtune_server.desk.queue import Queue, Wanted
from tests.fedtune_server.desk.office import FakeFlower, config, fab, write_ledger, write_status


class Desk:
    """A player whose clock a test moves, over a folder that survives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.queue = Queue(path / "queue")
        self.flower = FakeFlower()
        self.time = 0.0
        self.player = self.anew()

    def anew(self) -> Player:
        """The desk was killed and is there again."""
        self.player = Player(
            self.queue, self.path / "runs", self.flower, fab, now=lambda: self.time
        )
        return self.player

    def want(self, name: str, since: str = "2026-01-01") -> None:
        self.queue.put(Wanted(name, config(name).model_dump_json(), since))

    def folder(self, name: str = "a") -> Path:
        return self.path / "runs" / name

    def step(self, seconds: float = 100.0) -> None:
        self.time += seconds
        self.player.step()

    def state(self, name: str = "a") -> tuple[str, str]:
        run = self.queue.need(name)
        return run.ended, run.reason


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_runs_are_played_one_after_another_in_the_order_they_were_asked_for(desk: Desk) -> None:
    desk.want("b", "2026-01-02")
    desk.want("a", "2026-01-01")
    desk.step()
    desk.step()
    assert desk.flower.started == ["a"]
    write_status(desk.folder("a"), "finished", 3)
    desk.flower.end(100, "completed")
    desk.step()
    desk.step()
    assert desk.flower.started == ["a", "b"]
    assert desk.state("a") == ("finished", "")
    assert desk.flower.most_at_once == 1


def test_a_full_disk_does_not_make_run_after_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.want("a")
    with monkeypatch.context() as full:

        def no_room(*_: object) -> None:
            raise RunError("the disk is full")

        full.setattr("fedtune_server.desk.queue.write_durably", no_room)
        for _ in range(20):
            with suppress(RunError):
                desk.step(seconds=1.0)
    assert len(desk.flower.started) == 1
    desk.step()
    desk.step()
    assert len(desk.flower.started) == 2
    assert desk.queue.need("a").flower_run_id == 101


def test_a_run_whose_process_died_is_started_again(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    write_status(desk.folder(), "running", 1)
    desk.flower.end(100, details="No heartbeat received from the task")
    desk.step()
    desk.step()
    assert desk.flower.started == ["a", "a"]
    run = desk.queue.need("a")
    assert (run.restarts, run.fruitless, run.ended) == (1, 0, "")
    assert "No heartbeat" in run.reason


def test_a_run_that_failed_in_words_is_not_started_again(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    write_status(desk.folder(), "failed", 1)
    write_ledger(desk.folder(), {"kind": "run_failed", "reason": "too few devices reported"})
    desk.flower.end(100)
    desk.step()
    desk.step()
    assert desk.state() == ("failed", "too few devices reported")
    assert desk.flower.started == ["a"]


def test_a_run_that_failed_by_a_fault_is_started_again(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    write_status(desk.folder(), "failed", 1)
    write_ledger(desk.folder(), {"kind": "run_failed", "reason": "ConnectError('refused')"})
    desk.flower.end(100)
    desk.step()
    desk.step()
    assert desk.flower.started == ["a", "a"]


def test_what_an_earlier_process_said_does_not_count(desk: Desk) -> None:
    write_status(desk.folder(), "failed", 1)
    write_ledger(desk.folder(), {"kind": "run_failed", "reason": "of long ago"})
    desk.want("a")
    desk.step()
    desk.flower.end(100)  # without a word
    desk.step()
    desk.step()
    assert desk.flower.started == ["a", "a"]


def test_twenty_ends_without_a_saved_round_are_enough(desk: Desk) -> None:
    desk.want("a")
    for _ in range(80):
        desk.step()
        if desk.flower.known:
            desk.flower.end(max(desk.flower.known), details="exit code 1")
    ended, reason = desk.state()
    assert ended == "failed"
    assert "20 times in a row" in reason
    assert "exit code 1" in reason
    assert len(desk.flower.started) == 20


def test_progress_is_patience(desk: Desk) -> None:
    desk.want("a")
    for n in range(60):
        desk.step()
        write_status(desk.folder(), "running", n + 1)
        desk.flower.end(max(desk.flower.known))
        desk.step()
    assert desk.state()[0] == ""


def test_pauses_grow(desk: Desk) -> None:
    desk.want("a")
    waited = []
    for n in range(5):
        desk.step(0)
        started = desk.time
        while len(desk.flower.started) == n:
            desk.step(0.5)
        waited.append(desk.time - started)
        desk.flower.end(100 + n)
    assert waited == [0, 1, 2, 4, 8]


def test_stopping_ends_the_flower_run_and_a_run_that_waits(desk: Desk) -> None:
    desk.want("a", "2026-01-01")
    desk.want("b", "2026-01-02")
    desk.step()
    for name in ("a", "b"):
        desk.queue.change(name, wanted="stopped", reason="the operator stopped it")
    desk.step()
    desk.step()
    assert desk.state("a") == desk.state("b") == ("stopped", "the operator stopped it")
    assert desk.flower.known[100].sub_status == "stopped"
    assert desk.flower.started == ["a"]


def test_a_desk_that_was_killed_after_starting_a_run_does_not_play_it_twice(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    desk.queue.put(replace(desk.queue.need("a"), flower_run_id=None))  # the id was not written
    desk.anew().step()
    desk.step()
    assert desk.flower.most_at_once == 1
    assert desk.flower.known[100].sub_status == "stopped"
    assert desk.flower.started == ["a", "a"]


def test_a_desk_that_was_killed_goes_on_with_the_run_that_is_played(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    desk.anew().step()
    assert desk.flower.started == ["a"]
    write_status(desk.folder(), "finished", 3)
    desk.flower.end(100, "completed")
    desk.anew().step()
    assert desk.state() == ("finished", "")


def test_a_run_that_finished_unseen_is_not_played_again(desk: Desk) -> None:
    write_status(desk.folder(), "finished", 3)
    desk.want("a")
    desk.step()
    assert desk.flower.started == []
    assert desk.state() == ("finished", "")


def test_a_link_that_is_away_changes_nothing(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    desk.flower.away = True
    with pytest.raises(DeploymentError):
        desk.step()
    assert desk.state() == ("", "")
    desk.flower.away = False
    desk.step()
    assert desk.flower.started == ["a"]


def test_a_link_that_lost_its_runs_has_them_started_again(desk: Desk) -> None:
    desk.want("a")
    desk.step()
    desk.flower.known.clear()
    desk.step()
    desk.step()
    assert desk.flower.started == ["a", "a"]


def test_a_damaged_file_is_named(desk: Desk) -> None:
    desk.want("a")
    path = desk.path / "queue" / "a.json"
    for content in (b"", b"[]", b"{}", b'{"name": "b"}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"a\.json is not"):
            desk.step()
