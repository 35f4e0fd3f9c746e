"""A run of the queue, played on sites that compute nothing."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Context, RecordDict

from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.site_task import RUN_KEY
from fedtune.errors import ConfigError, RoundError, RunError, StoppedError
from fedtune.records import Event
from fedtune.wire.ledger_chain import verify_ledger
from fedtune_server import deployed
from fedtune_server.hierarchy.below import Answering
from tests.fedtune_server.live_grid import Directory, LiveGrid, Site

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py
Tree = dict[str, dict[str, Any]]

TREE: Tree = {
    "run": {"name": "ward", "rounds": 3, "round_deadline_s": 30.0},
    "model": {"path": "not/read/here"},
    "data": {"max_tokens": 16},
    "lora": {"rank_max": 3, "rank_cap": 6},
    "train": {"batch_size": 4, "local_steps": 3},
    "importance": {"method": "uniform"},
    "deployment": {"sites": ["a", "b", "c"], "deadline_s": 5.0},
}


class Desk:
    """A coordinator's home, with one run in its queue."""

    def __init__(self, fleet_of: FleetOf, home: CoordinatorHome) -> None:
        self.home, self.tree = home, copy.deepcopy(TREE)
        self.fake = fleet_of("a", "b", "c")
        self.directory = Directory(("a", "b", "c"))
        self.finished: list[Path] = []
        home.queue.mkdir(parents=True)

    def queue(self, wanted: str = "running") -> None:
        entry = {"name": "ward", "config_json": json.dumps(self.tree), "wanted": wanted}
        (self.home.queue / "ward.json").write_text(json.dumps(entry), encoding="utf-8")

    def play(self, grid: LiveGrid) -> Path:
        def finish(config: Any, folder: Path, emit: Callable[[Event], None]) -> None:
            self.finished.append(folder)
            emit(Event("exported", {"paths": {}, "skipped": {}}))

        return deployed.play_deployed(
            grid, self.home, "ward", finish=finish, directory=self.directory
        )

    def ledger(self, kind: str) -> list[dict[str, Any]]:
        path = self.home.runs / "ward" / "ledger.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

    def status(self) -> dict[str, Any]:
        path = self.home.runs / "ward" / "status.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


@pytest.fixture
def desk(fleet_of: FleetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(fleet_of, CoordinatorHome(tmp_path / "home"))
    monkeypatch.setattr(deployed, "resolve_model", lambda path, revision: Path(path))
    monkeypatch.setattr(deployed, "read_shapes", lambda *rest: desk.fake.shapes)
    desk.queue()
    return desk


def test_a_run_of_the_queue_is_played_into_its_folder(desk: Desk) -> None:
    with LiveGrid(desk.fake) as grid:
        folder = desk.play(grid)
    assert folder == desk.home.runs / "ward"
    assert desk.finished == [folder]
    assert desk.status()["state"] == "finished"
    assert desk.status()["round"] == 3
    assert len(desk.ledger("round_finished")) == 3
    (awaited,) = desk.ledger("sites_awaited")
    assert (awaited["here"], awaited["missing"], awaited["needed"]) == (["a", "b", "c"], [], 3)
    verify_ledger(folder / "ledger.jsonl")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["simulation"]["clock"] == "measured"
    assert config["outputs"]["folder"] == str(folder)
    assert not (folder / "logs").exists()


def test_the_sites_of_a_run_are_those_that_it_names(desk: Desk) -> None:
    desk.tree["deployment"]["sites"] = ["a", "c"]
    desk.queue()
    with LiveGrid(desk.fake) as grid:
        desk.play(grid)
    assert {order.plan.device for order in desk.fake.orders} == {"a", "c"}


def test_all_enrolled_sites_and_no_revoked_one_take_part(desk: Desk) -> None:
    desk.tree["deployment"]["sites"] = ["*"]
    desk.queue()
    desk.directory.states["b"] = Site("revoked")
    with LiveGrid(desk.fake) as grid:
        desk.play(grid)
    assert {order.plan.device for order in desk.fake.orders} == {"a", "c"}


def test_a_site_that_speaks_for_another_is_excluded(desk: Desk) -> None:
    desk.tree["deployment"] |= {"minimum": 2}
    desk.queue()
    desk.directory.names = ("a", "other", "c")
    desk.tree["deployment"]["sites"] = ["*"]
    desk.queue()
    with LiveGrid(desk.fake) as grid:
        desk.play(grid)
    reasons = {entry["reason"] for entry in desk.ledger("site_excluded")}
    assert any(reason.startswith("other calls itself 'b'") for reason in reasons)
    assert {order.plan.device for order in desk.fake.orders} == {"a", "c"}


def test_a_run_without_its_sites_ends_at_its_deadline_and_names_them(desk: Desk) -> None:
    desk.tree["deployment"]["deadline_s"] = 0.3
    desk.queue()
    with (
        LiveGrid(desk.fake, online=["a"]) as grid,
        pytest.raises(RoundError, match=r"expected 3 sites within 0.3 s .* a; missing: b, c"),
    ):
        desk.play(grid)
    assert desk.status()["state"] == "failed"


def test_a_site_that_is_not_ready_at_the_start_is_asked_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = desk.fake.reports["b"]
    desk.fake.change("b", base_digest="e" * 64)
    with LiveGrid(desk.fake) as grid:

        def look(count: int) -> None:
            if count > 3:
                desk.fake.reports["b"] = ready

        grid.on_look = look
        desk.play(grid)
    (excluded,) = desk.ledger("site_excluded")
    assert "b holds another base model" in excluded["reason"]
    assert desk.ledger("round_started")[0]["devices"] == ["a", "b", "c"]


def test_a_stopped_run_is_not_played(desk: Desk) -> None:
    desk.queue("stopped")
    with LiveGrid(desk.fake) as grid, pytest.raises(StoppedError, match="was stopped"):
        desk.play(grid)
    assert not (desk.home.runs / "ward").exists()


@pytest.mark.parametrize("by", ["operator", "link"])
def test_an_operators_stop_and_a_lost_link_leave_a_run_that_can_go_on(desk: Desk, by: str) -> None:
    with LiveGrid(desk.fake) as grid:

        def gone(message_ids: Any) -> Any:
            if by == "operator":
                desk.queue("stopped")
            raise httpx.ConnectError("no route")

        def pull(message_ids: Any, real: Any = grid.pull_messages) -> Any:
            return gone(message_ids) if len(desk.fake.orders) >= 4 else real(message_ids)

        grid.pull_messages = pull  # type: ignore[method-assign]
        words = "the operator stopped run ward" if by == "operator" else "link does not take part"
        with pytest.raises(StoppedError, match=words):
            desk.play(grid)
    assert desk.status()["state"] == "interrupted"
    assert len(desk.ledger("run_interrupted")) == 1
    assert not desk.ledger("run_failed")
    desk.queue()
    with LiveGrid(desk.fake) as grid:
        desk.play(grid)
    assert desk.status() | {"updated": ""} == {
        "state": "finished", "round": 3, "updated": "", "run": desk.status()["run"],
    }  # fmt: skip


def test_a_groups_run_that_is_asked_nothing_ends_when_it_is_stopped(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.tree["deployment"]["group"] = "east"
    desk.queue()
    looks: list[int] = []

    def step(self: Answering) -> None:
        looks.append(1)
        assert len(looks) < 5
        if len(looks) == 2:
            desk.queue("stopped")

    monkeypatch.setattr(Answering, "step", step)
    with LiveGrid(desk.fake) as grid, pytest.raises(StoppedError, match="was stopped"):
        desk.play(grid)
    assert len(looks) == 2
    assert desk.status()["state"] == "interrupted"
    assert len(desk.ledger("run_interrupted")) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_sigterm_ends_a_run_that_can_go_on(desk: Desk) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with LiveGrid(desk.fake) as grid:

        def look(count: int) -> None:
            if desk.ledger("round_finished"):
                os.kill(os.getpid(), signal.SIGTERM)

        grid.on_look = look
        with pytest.raises(StoppedError, match="told to end"):
            desk.play(grid)
    assert desk.status()["state"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["", "../ward", "a/b", ".hidden", 7, None, "x" * 101])
def test_a_flower_run_that_names_no_run_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="expected the name of a run under fedtune-run"):
        deployed.run_name({RUN_KEY: name})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"{", "is not a run's file"),
        (b'{"config_json": 3}', "is not a run's file"),
        (b'{"config_json": "[]"}', "must hold an object"),
        (b"[" * 100_000, "is not a run's file"),
        (b" " * 5_000_000, "is not a run's file"),
    ],
)
def test_a_damaged_queue_file_is_refused(desk: Desk, content: bytes | None, words: str) -> None:
    path = desk.home.queue / "ward.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=words):
        deployed.read_order(desk.home, "ward")


def test_a_queue_file_of_another_run_and_a_run_without_sites_are_refused(desk: Desk) -> None:
    desk.tree["run"]["name"] = "other"
    desk.queue()
    with pytest.raises(RunError, match="holds run 'other'"):
        deployed.read_order(desk.home, "ward")
    desk.tree["run"]["name"] = "ward"
    desk.tree["deployment"]["sites"] = []
    desk.tree |= {"fleet": {"any": {"count": 1, "memory": "1 GB"}}}
    desk.tree["data"]["train"] = "x.jsonl"
    desk.queue()
    with (
        LiveGrid(desk.fake) as grid,
        pytest.raises(ConfigError, match=r"deployment\.sites is empty"),
    ):
        desk.play(grid)


def test_the_app_plays_the_run_that_flower_names_from_its_home(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(config: Any, folder: Path, emit: Callable[[Event], None]) -> None:
        desk.finished.append(folder)

    monkeypatch.setattr(deployed, "_entry", lambda name: finish)
    monkeypatch.setattr(deployed, "_registry", lambda home: desk.directory)
    run_config: dict[str, bool | float | int | str] = {RUN_KEY: "ward"}
    with LiveGrid(desk.fake) as grid:
        context = Context(1, 1, {}, RecordDict(), run_config)
        monkeypatch.delenv("FEDTUNE_COORDINATOR_HOME", raising=False)
        with pytest.raises(ConfigError, match="FEDTUNE_COORDINATOR_HOME is not set"):
            deployed.app(grid, context)
        monkeypatch.setenv("FEDTUNE_COORDINATOR_HOME", str(desk.home.path))
        deployed.app(grid, context)
    assert desk.finished == [desk.home.runs / "ward"]
