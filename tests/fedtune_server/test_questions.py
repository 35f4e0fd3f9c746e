"""What is asked beside rounds, of devices whose node begins anew before it has answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, to_record
from fedtune.wire.messages import TaskSpec, encode_task_spec
from fedtune_server.exchange import Answer
from fedtune_server.fleet import ask_again
from fedtune_server.newcomers import Newcomers
from fedtune_server.presence import Again
from fedtune_server.questions import ask
from fedtune_server.roster import Registered
from tests.fedtune_server.live_grid import Directory, LiveGrid
from tests.fedtune_server.live_runs import FleetOf, Runs, hurry
from tests.fedtune_server.test_importance import DOWN, UP, Device

KINDS = (PROFILE, CALIBRATE, EVALUATE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def runs_of(fleet_of: FleetOf, folder: Path) -> Runs:
    """A run that measures its devices first."""
    runs = Runs(fleet_of, folder)
    runs.tree["run"] |= {"rounds": 1, "round_deadline_s": 8.0}
    runs.tree["importance"] = {"method": "sensitivity", "batches": 2}
    runs.needed = 3
    for at, name in enumerate(runs.fake.names):
        runs.fake.calibrated[name] = Device(runs.fake, {UP: 1.0 + at, DOWN: 3.0})
    return runs


@pytest.fixture
def runs(fleet_of: FleetOf, tmp_path: Path) -> Runs:
    return runs_of(fleet_of, tmp_path)


def befalls(
    grid: LiveGrid, device: str, kind: str, then: Callable[[], str], times: int = 1
) -> Callable[..., Any]:
    """A fault: a device's messages of one kind are lost, the first times."""
    done: list[bool] = []

    def fault(node: int, message: Any) -> str | None:
        mine = grid.names[node - 1000] == device and message.metadata.message_type == kind
        if not mine or len(done) >= times:
            return None
        done.append(True)
        return then()

    return fault


def killed(grid: LiveGrid, device: str, way: str) -> Callable[[], str]:
    """A node is killed and begins anew: before the link has noticed, or after it."""

    def soon() -> str:
        grid.come(device)  # activated anew, never offline; Flower does not deliver twice
        return "lost"

    def later() -> str:
        grid.leave(device)
        threading.Timer(0.2, grid.come, [device]).start()
        return "offline"

    return soon if way == "soon" else later


def asked_again(runs: Runs) -> list[tuple[str, str]]:
    return [(f["device"], f["message"]) for f in runs.fake.all("device_asked_again")]


@pytest.mark.parametrize("way", ["soon", "later"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_question_that_a_node_lost_is_asked_again_and_nothing_is_missing(
    runs: Runs, fleet_of: FleetOf, tmp_path: Path, kind: str, way: str
) -> None:
    whole = runs_of(fleet_of, tmp_path / "whole")
    with LiveGrid(whole.fake) as grid:
        whole.play(grid)
    assert not whole.fake.all("device_asked_again")
    with LiveGrid(runs.fake) as grid:
        grid._own_fault = befalls(grid, "b", kind, killed(grid, "b", way))
        began = time.monotonic()
        runs.play(grid)
    assert asked_again(runs) == [("b", kind)]
    assert time.monotonic() - began < 7  # run.round_deadline_s is 8
    for refusal in ("site_excluded", "calibration_refused", "device_refused"):
        assert not runs.fake.all(refusal)
    assert runs.fake.all("evaluated") == whole.fake.all("evaluated")
    assert (runs.folder / "importance.json").read_bytes() == (
        whole.folder / "importance.json"
    ).read_bytes()
    assert runs.checkpoint() == whole.checkpoint()


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_loses_a_question_each_time_is_asked_three_times_and_not_waited_for(
    runs: Runs, kind: str
) -> None:
    runs.needed = 2
    with LiveGrid(runs.fake) as grid:
        grid._own_fault = befalls(grid, "b", kind, killed(grid, "b", "soon"), times=99)
        began = time.monotonic()
        runs.play(grid)
    assert asked_again(runs) == [("b", kind)] * 2
    assert time.monotonic() - began < 7
    reasons = {
        fields["reason"]
        for refusal in ("site_excluded", "calibration_refused", "device_refused")
        for fields in runs.fake.all(refusal)
    }
    assert reasons == {"its node began anew each of 3 times"}


@pytest.mark.parametrize("kind", [CALIBRATE, EVALUATE])
def test_a_node_that_does_not_come_back_is_waited_for_as_in_a_round(runs: Runs, kind: str) -> None:
    runs.needed = 2
    with LiveGrid(runs.fake) as grid:

        def dies() -> str:
            grid.leave("b")
            return "offline"

        grid._own_fault = befalls(grid, "b", kind, dies)
        began = time.monotonic()
        runs.play(grid)
    assert 1.0 < time.monotonic() - began < 7  # it may come back within 1 s here
    assert not runs.fake.all("device_asked_again")
    refusal = "calibration_refused" if kind == CALIBRATE else "device_refused"
    (refused,) = runs.fake.all(refusal)
    assert (refused["device"], refused["reason"]) == ("b", "the node is offline")


def a_question(grid: LiveGrid, emit: Any, **more: Any) -> list[Answer]:
    """What devices say to one question, in the order of arrival."""
    directory = Directory(grid.names)
    roster = Registered(("*",), directory.sites, directory.name_of_node)
    task = TaskSpec("run-1", "causal-lm", "d" * 64, ())
    contents = dict.fromkeys(grid.names, to_record(PROFILE, encode_task_spec(task)))
    nodes = dict(zip(grid.names, grid.get_node_ids(), strict=True))
    terms = {"deadline_s": 1.0, "longest_s": 9.0, "return_s": 1.0, **more}
    again = Again(roster, terms["longest_s"], emit, terms["return_s"])
    return list(
        ask(
            grid,
            contents,
            nodes,
            kind=PROFILE,
            group="g",
            deadline_s=terms["deadline_s"],
            again=again,
        )
    )


def test_a_node_that_is_not_there_is_not_asked(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    with LiveGrid(fake, online=["a", "c"]) as grid:
        asked: list[int] = []
        grid._own_fault = lambda node, message: asked.append(node)
        began = time.monotonic()
        answers = {each.device: each for each in a_question(grid, fake.events.append)}
    assert time.monotonic() - began < 0.9
    assert asked == [1000, 1002]
    assert answers["b"].failure == "it is not connected"
    assert not answers["a"].failure
    assert not answers["c"].failure


def test_a_node_that_is_asked_again_has_as_long_as_before(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    with LiveGrid(fake) as grid:
        after_s = iter([1.5, 1.6])

        def lost() -> str:
            threading.Timer(next(after_s), grid.come, ["b"]).start()
            return "lost"

        grid._own_fault = befalls(grid, "b", PROFILE, lost, times=2)
        answers = a_question(grid, fake.events.append, deadline_s=3.0)
    assert len(fake.all("device_asked_again")) == 2
    assert not any(each.failure for each in answers)  # after 3.1 s


def test_a_silent_node_fails_at_the_deadline(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    with LiveGrid(fake, fake.lose("b", PROFILE)) as grid:
        began = time.monotonic()
        answers = a_question(grid, fake.events.append, deadline_s=9.0, longest_s=0.5)
    assert 0.4 < time.monotonic() - began < 3
    assert [bool(each.failure) for each in answers] == [False, False, True]
    assert not fake.all("device_asked_again")


def test_however_often_it_is_asked_a_question_has_an_end(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    with LiveGrid(fake) as grid:

        def dies() -> str:
            grid.leave("b")
            return "offline"

        grid._own_fault = befalls(grid, "b", PROFILE, dies)
        began = time.monotonic()
        answers = a_question(grid, fake.events.append, longest_s=0.5, return_s=60.0)
    assert 0.4 < time.monotonic() - began < 3
    assert [each.failure for each in answers] == ["", "", "the node is offline"]


def test_where_devices_stay_nobody_looks_who_is_there(fleet_of: FleetOf) -> None:
    fake = fleet_of("a", "b", "c")
    with LiveGrid(fake) as grid:
        fleet = fake.gather(grid)
        task = TaskSpec("run-1", "causal-lm", fake.shapes.digest, ())
        assert len(ask_again(grid, fleet, fleet.names, task, 5.0)) == 3
        assert grid.looked == 0


def test_a_device_that_refused_its_plan_is_asked_again_what_it_is(runs: Runs) -> None:
    runs.tree["run"]["rounds"] = 2
    with LiveGrid(runs.fake) as grid:
        profiles = befalls(grid, "b", PROFILE, killed(grid, "b", "soon"))

        def fault(node: int, message: Any) -> Any:
            return profiles(node, message) if runs.fake.orders else None

        def fails(said: Any, tensors: bytes) -> Any:
            del runs.fake.spoil["b"]
            raise MemoryError("no memory left")

        runs.fake.spoil["b"] = fails
        grid._own_fault = fault
        began = time.monotonic()
        runs.play(grid)
    assert time.monotonic() - began < 7
    assert asked_again(runs) == [("b", PROFILE)]
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [2, 3]


def test_a_newcomer_that_lost_its_invitation_is_invited_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Newcomers.__init__, "__defaults__", (0.2,))
    runs.tree["run"]["rounds"] = 4
    runs.needed = 2
    with LiveGrid(runs.fake, online=["a", "c"]) as grid:

        def look(count: int) -> None:
            if runs.fake.all("round_finished") and "b" not in grid.online:
                grid.come("b")

        grid.on_look = look
        grid._own_fault = befalls(grid, "b", PROFILE, killed(grid, "b", "soon"))
        runs.play(grid)
    assert asked_again(runs) == [("b", PROFILE)]
    (joined,) = runs.fake.all("site_joined")
    assert (joined["device"], joined["round"]) == ("b", 3)


def test_a_run_that_goes_on_asks_again_who_lost_its_first_question(
    runs: Runs, fleet_of: FleetOf
) -> None:
    with LiveGrid(runs.fake) as grid:
        runs.play(grid)
    runs.fake = fleet_of("a", "b", "c")
    runs.tree["run"]["rounds"] = 2
    with LiveGrid(runs.fake) as grid:
        grid._own_fault = befalls(grid, "b", PROFILE, killed(grid, "b", "soon"))
        runs.play(grid)
    assert asked_again(runs) == [("b", PROFILE)]
    assert not runs.fake.all("site_excluded")
    assert [f["reported"] for f in runs.fake.all("round_finished")] == [3]
