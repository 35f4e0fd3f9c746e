"""The ClientApp: every message reaches its site's agent, and its answer goes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedtune.train.measure_device import probe_profile
from fedtune.wire import messages
from fedtune.wire.flower import EVALUATE, PROFILE, TRAIN, from_record, to_record
from fedtune.wire.packing import tensors_digest
from fedtune_client import app as app_module
from fedtune_client.app import make_simulated_client_app
from fedtune_client.site import SimulatedFleet, SiteSettings
from fedtune_server.simulation.grid import InProcessGrid

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages


@pytest.fixture
def grid(desk: Desk) -> Iterator[InProcessGrid]:
    with InProcessGrid(make_simulated_client_app(desk.config), 4) as grid:
        yield grid


def ask(grid: InProcessGrid, kind: str, content: RecordDict, partition: int = 0) -> Message:
    (reply,) = grid.send_and_receive([Message(content, 1000 + partition, kind)])
    return reply


def failure(reply: Message) -> str:
    assert reply.has_error()
    return str(reply.error.reason)


def test_the_profile_query_is_answered_by_the_nodes_own_site(
    desk: Desk, grid: InProcessGrid
) -> None:
    for partition, name in enumerate(("east", "north", "south", "west")):
        content = to_record(PROFILE, messages.encode_task_spec(desk.spec))
        body, tensors = from_record(ask(grid, PROFILE, content, partition).content, PROFILE)
        assert messages.decode_site_report(body).profile.name == name
        assert tensors is None


@dataclass(frozen=True)
class ProbedSites:
    """Sites on this very machine: each reports what was measured of it."""

    config_json: str
    cache: Path

    def __call__(self, node_config: Mapping[str, object]) -> SiteSettings:
        site = SimulatedFleet(self.config_json)(node_config)
        return replace(site, profile=probe_profile(site.profile.name, self.cache))


def test_a_probed_machine_answers_the_profile_query(desk: Desk, tmp_path: Path) -> None:
    sites = ProbedSites(desk.config.model_dump_json(), tmp_path)
    content = to_record(PROFILE, messages.encode_task_spec(desk.spec))
    with InProcessGrid(app_module.make_client_app(sites), 4) as grid:
        body, _ = from_record(ask(grid, PROFILE, content, 1).content, PROFILE)
    sent = messages.decode_site_report(body).profile
    again = probe_profile("north", tmp_path)
    # Measured once and read back; only the free memory may have changed in between.
    assert replace(sent, memory_bytes=1, accelerator_memory_bytes=0) == replace(
        again, memory_bytes=1, accelerator_memory_bytes=0
    )
    assert sent.compute != "auto"
    assert sent.memory_bytes > 10**7


def test_training_answers_with_a_report_and_the_tensors_that_it_names(
    desk: Desk, grid: InProcessGrid
) -> None:
    plan = desk.plan("north")
    packed = desk.tensors(plan)
    body = messages.encode_train_instruction(desk.order(plan, packed, round=2))
    reply = ask(grid, TRAIN, to_record(TRAIN, body, packed), 1)
    body, tensors = from_record(reply.content, TRAIN)
    report = messages.decode_train_report(body)
    assert (report.device, report.round) == ("north", 2)
    assert tensors is not None
    assert report.tensors_digest == tensors_digest(tensors)


def test_evaluation_answers_with_a_report_alone(desk: Desk, grid: InProcessGrid) -> None:
    plan = desk.plan("north")
    packed = desk.tensors(plan)
    body = messages.encode_evaluate_instruction(desk.evaluation(plan, packed))
    reply = ask(grid, EVALUATE, to_record(EVALUATE, body, packed), 1)
    body, tensors = from_record(reply.content, EVALUATE)
    assert messages.decode_evaluate_report(body).metrics["held_out_loss"] > 0
    assert tensors is None


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_an_order_without_tensors_is_refused(desk: Desk, grid: InProcessGrid, kind: str) -> None:
    plan = desk.plan("east")
    body = messages.encode_train_instruction(desk.order(plan, b""))
    reason = failure(ask(grid, kind, to_record(kind, body)))
    assert f"message {kind}: expected tensors beside it, found none" in reason


def test_bytes_that_are_no_order_are_refused(grid: InProcessGrid) -> None:
    assert "TrainInstruction" in failure(
        ask(grid, TRAIN, to_record(TRAIN, b"\xff\xff", b"12345678"))
    )


def test_a_site_is_opened_once_whatever_the_number_of_messages_and_apps(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    agent = app_module.Agent
    monkeypatch.setattr(app_module, "Agent", lambda site: (made.append(site), agent(site))[1])
    app_module._kept_agent.cache_clear()
    content = to_record(PROFILE, messages.encode_task_spec(desk.spec))
    for _ in range(2):  # some engines unpickle the app anew for every message
        with InProcessGrid(make_simulated_client_app(desk.config), 4) as grid:
            for partition in (0, 1, 0):
                ask(grid, PROFILE, content, partition)
    assert len(made) == 2
