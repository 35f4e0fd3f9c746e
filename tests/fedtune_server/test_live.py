"""Rounds of devices that leave, come back, and come late; they compute nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import RoundError
from fedtune.export.plan_check import plan_difference
from fedtune.records import Event
from fedtune.wire.flower import TRAIN
from tests.fedtune_server.live_grid import LiveGrid
from tests.fedtune_server.live_runs import Runs, hurry

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture
def runs(fleet_of: FleetOf, tmp_path: Path) -> Runs:
    return Runs(fleet_of, tmp_path)


def once(grid: LiveGrid, device: str, round: int, then: Callable[[], Any]) -> Callable[..., Any]:
    """A fault: one device's work of one round is lost, the first time."""
    done: list[bool] = []

    def befalls(node: int, message: Any) -> Any:
        mine = grid.names[node - 1000] == device and message.metadata.message_type == TRAIN
        if mine and message.metadata.group_id == str(round) and not done:
            done.append(True)
            return then()
        return None

    return befalls


def test_a_device_that_is_killed_and_comes_back_does_its_round(
    runs: Runs, fleet_of: FleetOf, tmp_path: Path
) -> None:
    whole = Runs(fleet_of, tmp_path / "whole")
    whole.needed = 3
    with LiveGrid(whole.fake) as grid:
        whole.play(grid)
    runs.needed = 3
    with LiveGrid(runs.fake) as grid:

        def dies() -> str:
            grid.leave("b")
            threading.Timer(0.2, grid.come, ["b"]).start()
            return "offline"

        grid._own_fault = once(grid, "b", 2, dies)
        runs.play(grid)
    assert [fields["device"] for fields in runs.fake.all("device_asked_again")] == ["b"]
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 3, 3]
    assert not runs.fake.all("round_repeated")
    assert runs.checkpoint() == whole.checkpoint()


def test_a_device_that_is_back_before_the_link_noticed_is_asked_again(runs: Runs) -> None:
    with LiveGrid(runs.fake) as grid:

        def dies() -> str:
            grid.come("b")  # activated anew, never offline; Flower does not deliver twice
            return "lost"

        grid._own_fault = once(grid, "b", 2, dies)
        began = time.monotonic()
        runs.play(grid)
    assert time.monotonic() - began < 10
    assert [fields["device"] for fields in runs.fake.all("device_asked_again")] == ["b"]
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 3, 3]


def test_a_round_goes_on_without_a_device_that_does_not_come_back(runs: Runs) -> None:
    with LiveGrid(runs.fake) as grid:

        def dies() -> str:
            grid.leave("b")
            return "offline"

        grid._own_fault = once(grid, "b", 2, dies)
        runs.play(grid)
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 2, 2]
    assert runs.fake.all("round_started")[2]["devices"] == ["a", "c"]  # it is not asked in vain
    assert {f["device"] for f in runs.fake.all("device_refused")} == {"b"}


def test_a_round_waits_for_the_devices_that_it_needs(runs: Runs) -> None:
    runs.tree["run"]["minimum_devices"] = 3
    runs.tree["deployment"]["sites"] = ["a", "b", "c"]
    runs.needed = 3
    with LiveGrid(runs.fake) as grid:

        def look(count: int) -> None:
            finished = runs.fake.all("round_finished")
            if len(finished) == 1 and "c" in grid.online and not runs.fake.all("round_waits"):
                grid.leave("c")
            elif runs.fake.all("round_waits") and "c" not in grid.online:
                grid.come("c")

        grid.on_look = look
        runs.play(grid)
    (waits,) = runs.fake.all("round_waits")
    assert (waits["round"], waits["here"], waits["missing"]) == (2, ["a", "b"], ["c"])
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 3, 3]
    assert not runs.fake.all("round_repeated")


def test_a_round_without_enough_devices_ends_at_its_deadline(runs: Runs) -> None:
    runs.tree["run"]["minimum_devices"] = 3
    runs.patience_s, runs.needed = 0.5, 3
    runs.tree["deployment"]["sites"] = ["a", "b", "c"]
    with LiveGrid(runs.fake) as grid:

        def look(count: int) -> None:
            if runs.fake.all("round_finished"):
                grid.leave("c")

        grid.on_look = look
        began = time.monotonic()
        with pytest.raises(RoundError, match=r"round 2 needs 3 devices, found a, b within 0.5 s"):
            runs.play(grid)
    assert time.monotonic() - began < 5


def test_a_late_joiner_enters_at_the_next_round_and_stays(runs: Runs) -> None:
    with LiveGrid(runs.fake, online=["a", "c"]) as grid:

        def look(count: int) -> None:
            if runs.fake.all("round_finished") and "b" not in grid.online:
                grid.come("b")

        grid.on_look = look
        runs.play(grid)
    (joined,) = runs.fake.all("site_joined")
    assert (joined["round"], joined["device"], joined["new"]) == (2, "b", True)
    assert joined["plan"]["device"] == "b"
    assert [len(f["devices"]) for f in runs.fake.all("round_started")] == [2, 3, 3]
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [2, 3, 3]
    rows = runs.fake.all("planned")[-1]["devices"]
    assert [row["device"] for row in rows] == ["a", "b", "c"]
    assert not plan_difference(runs.folder / "plan.json", rows)  # as fedtune verify does


@pytest.mark.parametrize("kind", ["base", "labels", "name", "group"])
def test_a_late_joiner_that_does_not_fit_is_told_once_why(runs: Runs, kind: str) -> None:
    if kind == "base":
        runs.fake.change("b", base_digest="e" * 64)
        words = "b holds another base model"
    elif kind == "labels":
        runs.fake.change("b", labels=("new",))
        words = "b has labels that the run does not know (new)"
    elif kind == "group":
        runs.fake.change("b", devices=3)
        words = "b stands for 3 devices, and its class 'any' allows 1"
    else:
        runs.fake.reports["b"] = runs.fake.reports["a"]
        words = "b calls itself 'a'"
    with LiveGrid(runs.fake, online=["a", "c"]) as grid:

        def look(count: int) -> None:
            if runs.fake.all("round_started") and "b" not in grid.online:
                grid.come("b")

        grid.on_look = look
        runs.play(grid)
    (told,) = runs.fake.all("site_excluded")
    assert told["device"] == "b"
    assert told["reason"].startswith(words)
    assert {device for _, device in runs.asked()} == {"a", "c"}


def test_a_run_that_goes_on_knows_its_late_joiner(
    runs: Runs, fleet_of: FleetOf, tmp_path: Path
) -> None:
    def started(runs: Runs, grid: LiveGrid) -> None:
        def look(count: int) -> None:
            if runs.fake.all("round_finished") and "b" not in grid.online:
                grid.come("b")

        grid.on_look = look

    whole = Runs(fleet_of, tmp_path / "whole")
    with LiveGrid(whole.fake, online=["a", "c"]) as grid:
        started(whole, grid)
        whole.play(grid)

    def ends(said: Any, tensors: bytes) -> Any:
        raise Killed

    def watch(event: Event) -> None:
        if event.kind == "site_joined":
            runs.fake.spoil["b"] = ends

    runs.watch = watch
    with LiveGrid(runs.fake, online=["a", "c"]) as grid:
        started(runs, grid)
        with pytest.raises(Killed):
            runs.play(grid)
    runs.fake = fleet_of("a", "b", "c")
    runs.needed = 3
    with LiveGrid(runs.fake) as grid:
        runs.play(grid)
    assert not runs.fake.all("site_joined")  # it belongs to the run
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 3]
    assert runs.checkpoint() == whole.checkpoint()


def test_a_device_that_was_away_when_the_run_went_on_comes_back_under_its_plan(
    runs: Runs, fleet_of: FleetOf
) -> None:
    with LiveGrid(runs.fake) as grid:
        runs.tree["run"]["rounds"] = 1
        runs.play(grid)
    runs.fake = fleet_of("a", "b", "c")
    runs.tree["run"]["rounds"] = 4
    with LiveGrid(runs.fake, online=["a", "c"]) as grid:

        def look(count: int) -> None:
            if runs.fake.all("round_finished") and "b" not in grid.online:
                grid.come("b")

        grid.on_look = look
        runs.play(grid)
    (joined,) = runs.fake.all("site_joined")
    assert (joined["device"], joined["new"], joined["round"]) == ("b", False, 3)
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [2, 3, 3]


def test_a_silent_device_is_given_up_by_its_own_deadline_and_the_events_say_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune_server.deadlines.FLOWER_S", 0.5)
    monkeypatch.setattr("fedtune_server.deadlines.LOADING_S", 0.5)
    runs.tree["rounds"] = {"late": "refuse"}
    with LiveGrid(runs.fake) as grid:
        grid._own_fault = once(grid, "b", 2, lambda: "lost")
        began = time.monotonic()
        runs.play(grid)
    assert time.monotonic() - began < 10  # run.round_deadline_s is 30
    started = runs.fake.all("round_started")[1]
    assert started["allowed_seconds"].keys() == {"a", "b", "c"}
    assert 0.5 <= started["allowed_seconds"]["b"] < 5
    (refused,) = runs.fake.all("device_refused")
    assert refused["device"] == "b"
    assert "no answer within" in refused["reason"]
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 2, 3]


def test_a_device_that_dies_each_time_is_asked_three_times_a_round(runs: Runs) -> None:
    with LiveGrid(runs.fake) as grid:

        def befalls(node: int, message: Any) -> Any:
            dies = grid.names[node - 1000] == "b" and message.metadata.message_type == TRAIN
            return "offline" if dies and message.metadata.group_id == "1" else None

        grid._own_fault = befalls
        runs.play(grid)
    assert len(runs.fake.all("device_asked_again")) == 2
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [2, 3, 3]


def test_a_device_that_begins_anew_each_time_is_given_up_after_three(runs: Runs) -> None:
    with LiveGrid(runs.fake) as grid:

        def befalls(node: int, message: Any) -> Any:
            if grid.names[node - 1000] != "b" or message.metadata.message_type != TRAIN:
                return None
            grid.come("b")
            return "lost" if message.metadata.group_id == "1" else None

        grid._own_fault = befalls
        began = time.monotonic()
        runs.play(grid)
    assert time.monotonic() - began < 10  # run.round_deadline_s is 30
    assert len(runs.fake.all("device_asked_again")) == 2
    (refused,) = runs.fake.all("device_refused")
    assert (refused["device"], refused["reason"]) == ("b", "its node began anew each of 3 times")
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [2, 3, 3]


def test_a_device_whose_node_flower_has_forgotten_fails_alone(runs: Runs) -> None:
    """Flower gives None in place of the id of a message to such a node."""
    with LiveGrid(runs.fake) as grid:
        real = grid.push_messages

        def push(messages: Any) -> list[Any]:
            messages = list(messages)
            kept = [m for m in messages if not forgotten(m)]
            ids = iter(real(kept) if kept else [])
            return [None if forgotten(m) else next(ids) for m in messages]

        def forgotten(message: Any) -> bool:
            last = message.metadata.group_id in ("2", "3", "end")
            return last and grid.names[message.metadata.dst_node_id - 1000] == "b"

        grid.push_messages = push  # type: ignore[method-assign]
        runs.play(grid)
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3, 2, 2]
    reasons = {f["reason"] for f in runs.fake.all("device_refused")}
    assert len(reasons) == 1
    assert "not registered any more" in reasons.pop()
