"""The run of a group's coordinator: what it says to questions of the level above."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.aggregate.delta import Delta
from fedtune.aggregate.low_rank import empty
from fedtune.config import parse_run_config
from fedtune.deploy.mailbox import Answer, Mailbox
from fedtune.deploy.site_task import TASK_KEY, site_task
from fedtune.records import DevicePlan, GlobalAdapter, LoraScale, MatrixPlan
from fedtune.settings import RunConfig
from fedtune.wire import messages
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN
from fedtune.wire.packing import tensors_digest
from fedtune.wire.tensors import pack_dispatch
from fedtune_server.hierarchy import Group, SubCoordinator, below
from fedtune_server.hierarchy.below import Answering, Wanted, WantedGrid, answer_above
from fedtune_server.roster import Registered
from fedtune_server.run_folder import RunFolder
from tests.fedtune_server.live_grid import Directory, LiveGrid
from tests.fedtune_server.live_runs import hurry

FleetOf = Callable[..., Any]  # tests/fedtune_server/conftest.py

TREE: dict[str, Any] = {
    "run": {"name": "ward", "rounds": 3, "round_deadline_s": 30.0},
    "model": {"path": "not/read/here"},
    "data": {"max_tokens": 16},
    "lora": {"rank_max": 3, "rank_cap": 6},
    "train": {"batch_size": 4, "local_steps": 3},
    "importance": {"method": "uniform"},
    "deployment": {"sites": ["*"], "deadline_s": 5.0, "group": "east"},
}


class Ward:
    """Two sites of a group that compute nothing, and the mailbox that the level above asks in."""

    def __init__(self, fleet_of: FleetOf, folder: RunFolder, mailbox: Mailbox) -> None:
        self.fake = fleet_of("a", "b")
        self.folder, self.mailbox = folder, mailbox
        self.config: RunConfig = parse_run_config(copy.deepcopy(TREE), "test")
        self.grid = LiveGrid(self.fake)
        self.restart()

    def restart(self) -> None:
        """Another process takes the place of the one before."""
        directory = Directory(self.grid.names)
        self.roster = Registered(("*",), directory.sites, directory.name_of_node, 2, 1, 5.0, 0.1)
        wanted = Wanted(self.mailbox)
        group = SubCoordinator(
            Group("east", "group", 2), self.config, self.fake.shapes,
            WantedGrid(self.grid, wanted), self.folder, self.fake.events.append, self.roster,
        )  # fmt: skip
        self.answering = Answering(self.config, group, self.folder, self.mailbox, wanted)

    def about(self, **more: Any) -> dict[str, object]:
        task = site_task(self.config).model_dump_json()
        shown = {"device_class": "group", "formats": [], "link_bytes_per_s": 5e6, "within_s": 20.0}
        return {TASK_KEY: task, **shown, **more}

    def say(self, kind: str, body: bytes, packed: bytes | None = None, **more: Any) -> Answer:
        number = self.mailbox.ask(kind, self.about(**more), body, packed)
        self.answering.step()
        found = self.mailbox.answer_to(number)
        assert found is not None
        return found

    def task(self) -> bytes:
        return messages.encode_task_spec(
            messages.TaskSpec("above-1", "causal-lm", self.fake.shapes.digest, ())
        )

    def order(self, round: int = 1) -> tuple[bytes, bytes]:
        """An instruction to train, and its tensors."""
        matrices = tuple(MatrixPlan(each.name, 8, "fp32", 0) for each in self.fake.shapes.matrices)
        plan = DevicePlan("east", matrices, 4, 4, 16, 3)
        start = GlobalAdapter(
            0, {m.name: empty(m.out_features, m.in_features) for m in self.fake.shapes.matrices}
        )
        rng = np.random.default_rng([0, round])
        packed = pack_dispatch(Delta(6).dispatch(start, plan, scale=LoraScale(), rng=rng), "fp32")
        order = messages.TrainInstruction(
            run="above-1",
            round=round,
            base_digest=self.fake.shapes.digest,
            plan=plan,
            optimizer=messages.OptimizerSpec("adamw", 1e-3, 1e-3),
            seed=0,
            tensors_digest=tensors_digest(packed),
            evaluate=True,
            scale=LoraScale(),
        )
        return messages.encode_train_instruction(order), packed


@pytest.fixture
def ward(fleet_of: FleetOf, tmp_path: Path) -> Iterator[Ward]:
    with RunFolder.create(tmp_path / "ward") as folder:
        made = Ward(fleet_of, folder, Mailbox(tmp_path / "east"))
        with made.grid:
            yield made


def test_a_group_says_what_its_sites_are_together(ward: Ward) -> None:
    found = ward.say(PROFILE, ward.task(), device_class="region", link_bytes_per_s=7e6)
    report = messages.decode_site_report(found.body)
    assert (report.profile.name, report.profile.device_class) == ("east", "region")
    assert (report.devices, report.train_samples) == (2, 30)
    assert report.profile.link_bytes_per_s == 7e6


def test_a_group_trains_and_says_how_far_it_is(ward: Ward) -> None:
    ward.say(PROFILE, ward.task())
    found = ward.say(TRAIN, *ward.order(round=2))
    report = messages.decode_train_report(found.body)
    assert (report.device, report.devices, report.held_samples) == ("east", 2, 30)
    assert found.tensors
    assert ward.folder.read_status().round == 2


def test_a_site_of_a_group_that_lost_its_question_is_asked_again(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    ward.say(PROFILE, ward.task())
    body, packed = ward.order()
    train = messages.decode_train_instruction(body)
    order = messages.EvaluateInstruction(
        run=train.run, round=0, base_digest=train.base_digest, plan=train.plan,
        tensors_digest=train.tensors_digest, scale=train.scale,
    )  # fmt: skip
    lost: list[int] = []

    def befalls(node: int, message: Any) -> str | None:
        if node != 1001 or message.metadata.message_type != EVALUATE or lost:
            return None
        lost.append(node)
        ward.grid.come("b")
        return "lost"

    ward.grid._own_fault = befalls
    began = time.monotonic()
    found = ward.say(EVALUATE, messages.encode_evaluate_instruction(order), packed)
    report = messages.decode_evaluate_report(found.body)
    assert time.monotonic() - began < 10  # the level above waits 20 s
    assert report.metrics["held_out_units"] == 30
    (again,) = ward.fake.all("device_asked_again")
    assert again == {"device": "b", "message": EVALUATE}


def test_the_same_work_is_not_done_twice(ward: Ward) -> None:
    """As when the site's process dies before it has handed the answer up."""
    ward.say(PROFILE, ward.task())
    first = ward.say(TRAIN, *ward.order())
    assert ward.say(TRAIN, *ward.order()) == first
    assert len(ward.fake.orders) == 2  # one per site
    assert ward.say(TRAIN, *ward.order(round=2)) != first
    assert len(ward.fake.orders) == 4


def test_a_question_is_answered_once(ward: Ward) -> None:
    ward.say(PROFILE, ward.task())
    looked = ward.grid.looked
    ward.answering.step()
    assert ward.grid.looked == looked


def test_a_process_that_takes_its_place_answers_the_question_that_is_there(ward: Ward) -> None:
    ward.say(PROFILE, ward.task())
    number = ward.mailbox.ask(TRAIN, ward.about(), *ward.order())
    ward.restart()
    ward.answering.step()
    found = ward.mailbox.answer_to(number)
    assert found is not None
    assert messages.decode_train_report(found.body).devices == 2


@pytest.mark.parametrize("again", [True, False], ids=["asked again", "taken back"])
def test_a_round_goes_on_only_while_somebody_waits_for_it(ward: Ward, again: bool) -> None:
    ward.say(PROFILE, ward.task())
    first = ward.mailbox.ask(TRAIN, ward.about(), *ward.order())
    second: list[str] = []

    def look(count: int) -> None:
        if not second:
            second.append("")
            if again:
                second[0] = ward.mailbox.ask(TRAIN, ward.about(), *ward.order())
            else:
                ward.mailbox.clear()

    ward.grid.on_look = look
    ward.answering.step()
    assert ward.mailbox.answer_to(first) is None or not again
    if again:
        found = ward.mailbox.answer_to(second[0])
        assert found is not None
        assert found.failure == ""
        assert len(ward.fake.orders) == 2
    else:
        assert ward.fake.orders == []
        assert ward.folder.read_status().round == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [({"max_tokens": 32}, r"data\.max_tokens is 32 above and 16"), ({}, "seed is 3 above and 0")],
)
def test_work_whose_samples_would_be_others_is_refused(
    ward: Ward, data: dict[str, Any], words: str
) -> None:
    tree = copy.deepcopy(TREE)
    tree["data"] |= data
    tree["run"] |= {} if data else {"seed": 3}
    task = site_task(parse_run_config(tree, "test")).model_dump_json()
    found = ward.say(PROFILE, ward.task(), **{TASK_KEY: task})
    assert re.search(words, found.failure)
    assert ward.grid.looked == 0


@pytest.mark.parametrize(
    "about",
    [
        {"within_s": -1},
        {"within_s": "long"},
        {"link_bytes_per_s": float("nan")},
        {"device_class": 5},
        {"formats": "fp32"},
        {TASK_KEY: 5},
    ],
)
def test_what_no_site_says_is_refused(ward: Ward, about: dict[str, Any]) -> None:
    assert ward.say(PROFILE, ward.task(), **about).failure
    assert ward.grid.looked == 0


def test_bytes_that_are_no_message_are_refused(ward: Ward) -> None:
    assert "expected tensors" in ward.say(TRAIN, ward.order()[0]).failure
    assert ward.say(TRAIN, b"\xff\xff", b"").failure
    assert ward.say("train.other", b"").failure == (
        "a group does not know messages of kind 'train.other'"
    )
    assert ward.say(CALIBRATE, b"").failure.startswith("a group does not measure")


def test_a_site_that_stands_for_more_than_it_may_is_left_out(ward: Ward) -> None:
    ward.fake.change("b", devices=100)
    found = ward.say(PROFILE, ward.task())
    assert messages.decode_site_report(found.body).devices == 1
    assert "b stands for 100 devices" in ward.fake.all("site_excluded")[0]["reason"]


def test_a_round_closes_in_the_time_that_the_level_above_gives(ward: Ward) -> None:
    ward.say(PROFILE, ward.task())
    ward.grid._own_fault = ward.fake.lose("b", TRAIN)
    began = time.monotonic()
    found = ward.say(TRAIN, *ward.order(), within_s=1.0)
    assert time.monotonic() - began < 15
    assert messages.decode_train_report(found.body).devices == 1


def test_a_run_lasts_until_it_is_interrupted_and_goes_on(
    ward: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = ward.config.outputs.model_copy(update={"folder": str(tmp_path / "run")})
    config = ward.config.model_copy(update={"outputs": outputs})
    kinds: list[str] = []
    steps: list[int] = []

    def step(self: Answering) -> None:
        steps.append(1)
        assert ward.mailbox.silent_s() is not None or len(steps) < 20
        if ward.mailbox.silent_s() is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answering, "step", step)
    monkeypatch.setattr(below, "_POLL_S", 0.05)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            answer_above(
                config, ward.fake.shapes, ward.grid, ward.roster, ward.mailbox,
                lambda event: kinds.append(event.kind), lambda: None,
            )  # fmt: skip
    assert kinds == ["run_started", "run_interrupted", "run_resumed", "run_interrupted"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "interrupted"
