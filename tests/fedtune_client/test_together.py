"""Devices that answer together answer as they would alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Message

from fedtune.records import TrainingWay
from fedtune.wire import messages
from fedtune.wire.flower import EVALUATE, TRAIN, from_record, to_record
from fedtune_client import together as together_module
from fedtune_client.app import make_simulated_client_app
from fedtune_client.site import SimulatedFleet
from fedtune_client.together import SideBySide, make_side_by_side
from fedtune_server.simulation.grid import InProcessGrid

Desk = Any  # tests/fedtune_client/conftest.py; test folders are not importable packages
PLAIN = TrainingWay()
NAMES = ("east", "north", "south", "west")


def side_by_side(desk: Desk, most: int = 8) -> SideBySide:
    return SideBySide(SimulatedFleet(desk.config.model_dump_json()), most)


def order(
    desk: Desk,
    partition: int,
    way: TrainingWay = PLAIN,
    **changes: Any,
) -> Message:
    plan = desk.plan(NAMES[partition], **changes)
    packed = desk.tensors(plan)
    optimizer = messages.OptimizerSpec(way=way)
    body = messages.encode_train_instruction(desk.order(plan, packed, optimizer=optimizer))
    return Message(to_record(TRAIN, body, packed), 1000 + partition, TRAIN)


def ask(desk: Desk, together: SideBySide | None, **changes: Any) -> dict[int, Message]:
    """Replies of all four devices, by node id."""
    app = make_simulated_client_app(desk.config)
    with InProcessGrid(app, 4, together=together) as grid:
        asked = [order(desk, partition, **changes) for partition in range(4)]
        replies = grid.send_and_receive(asked)
    nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in asked}
    return {nodes[reply.metadata.reply_to_message_id]: reply for reply in replies}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of devices of every pass."""
    seen: list[int] = []
    real = together_module.train_side_by_side

    def count(backbone: Any, shares: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(shares))
        return real(backbone, shares, *rest, **named)

    monkeypatch.setattr(together_module, "train_side_by_side", count)
    return seen


def without_seconds(reply: Message) -> tuple[object, bytes | None]:
    body, tensors = from_record(reply.content, TRAIN)
    report = messages.decode_train_report(body)
    metrics = {name: value for name, value in report.metrics.items() if name != "seconds"}
    return replace(report, metrics=metrics), tensors


def test_together_and_alone_answer_with_the_same_bytes(desk: Desk, passes: list[int]) -> None:
    alone, together = ask(desk, None), ask(desk, side_by_side(desk))
    assert passes == [4]
    assert sorted(alone) == sorted(together) == [1000, 1001, 1002, 1003]
    for node, reply in alone.items():
        assert without_seconds(reply) == without_seconds(together[node])


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (TrainingWay("allora"), [4]),
        (TrainingWay(layer_rate_decay=0.5), [4]),
        (TrainingWay("s2ft"), []),
        (TrainingWay("greentrainer", flops_share=0.5), []),
        (TrainingWay(start="pissa"), []),
    ],
    ids=["allora", "decay", "s2ft", "greentrainer", "pissa"],
)
def test_ways_go_together_where_only_the_optimiser_differs(
    desk: Desk, passes: list[int], way: TrainingWay, expected: list[int]
) -> None:
    alone, together = ask(desk, None, way=way), ask(desk, side_by_side(desk), way=way)
    assert passes == expected
    for node, reply in alone.items():
        assert without_seconds(reply) == without_seconds(together[node])


def test_no_more_devices_than_allowed_go_together(desk: Desk, passes: list[int]) -> None:
    ask(desk, side_by_side(desk, most=3))
    assert passes == [3]  # the fourth is alone, and goes the ordinary way


def test_a_pass_does_not_grow_past_its_tokens(
    desk: Desk, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together_module, "_PASS_TOKENS", 1)
    assert len(ask(desk, side_by_side(desk))) == 4
    assert passes == [1, 1, 1, 1]


def test_a_device_that_is_refused_fails_alone(desk: Desk, passes: list[int]) -> None:
    app = make_simulated_client_app(desk.config)
    plan = desk.plan("north")
    packed = desk.tensors(plan)
    wrong = replace(desk.order(plan, packed), tensors_digest="0" * 64)
    body = messages.encode_train_instruction(wrong)
    with InProcessGrid(app, 4, together=side_by_side(desk)) as grid:
        replies = grid.send_and_receive(
            [
                order(desk, 0),
                Message(to_record(TRAIN, body, packed), 1001, TRAIN),
                order(desk, 2),
            ]
        )
    assert passes == [2]
    (failed,) = [reply for reply in replies if reply.has_error()]
    assert "north: the tensors do not have the sha256" in str(failed.error.reason)


def test_a_device_that_breaks_a_pass_fails_alone(
    desk: Desk, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune_client import agent as agent_module

    alone = ask(desk, None)

    def refuse(*_: Any) -> Any:
        raise MemoryError("too much for all of them")

    monkeypatch.setattr(together_module, "Share", refuse)
    real, trained = agent_module.train_round, iter(range(4))

    def fail_second(*arguments: Any, **named: Any) -> Any:
        if next(trained) == 1:
            raise MemoryError("the second asks for too much")
        return real(*arguments, **named)

    monkeypatch.setattr(agent_module, "train_round", fail_second)
    found = ask(desk, side_by_side(desk))
    assert "asks for too much" in str(found[1001].error.reason)
    for node in (1000, 1002, 1003):
        assert without_seconds(found[node]) == without_seconds(alone[node])
    assert passes == []


def evaluation(desk: Desk, partition: int) -> Message:
    plan = desk.plan(NAMES[partition])
    packed = desk.tensors(plan)
    body = messages.encode_evaluate_instruction(desk.evaluation(plan, packed))
    return Message(to_record(EVALUATE, body, packed), 1000 + partition, EVALUATE)


def test_measurements_together_are_those_of_each_alone(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    real = together_module.held_out_losses

    def count(backbone: Any, devices: Any, *rest: Any) -> Any:
        measured.append(len(devices))
        return real(backbone, devices, *rest)

    monkeypatch.setattr(together_module, "held_out_losses", count)
    app = make_simulated_client_app(desk.config)
    bodies = []
    for together in (None, side_by_side(desk)):
        with InProcessGrid(app, 4, together=together) as grid:
            replies = grid.send_and_receive([evaluation(desk, i) for i in range(4)])
        bodies.append(sorted(from_record(reply.content, EVALUATE)[0] for reply in replies))
    assert bodies[0] == bodies[1]
    assert measured == [4]


def test_plans_that_cut_batches_otherwise_do_not_go_together(desk: Desk) -> None:
    together = side_by_side(desk)
    key = together.key(order(desk, 0))
    assert key is not None
    assert together.key(order(desk, 1)) == key
    assert together.key(order(desk, 1, micro_batch=4)) != key
    assert together.key(order(desk, 1, format="q4")) != key
    assert together.key(Message(to_record(EVALUATE, b""), 1000, EVALUATE)) is None
    assert together.key(Message(to_record(TRAIN, b"no order"), 1000, TRAIN)) is None


def test_a_run_can_ask_for_one_device_at_a_time(desk: Desk) -> None:
    config = desk.config
    assert make_side_by_side(config) is not None
    one = config.model_copy(
        update={"simulation": config.simulation.model_copy(update={"devices_per_pass": 1})}
    )
    assert make_side_by_side(one) is None


def test_devices_whose_time_is_measured_work_one_by_one(desk: Desk) -> None:
    config = desk.config
    measured = config.model_copy(
        update={"simulation": config.simulation.model_copy(update={"clock": "measured"})}
    )
    assert make_side_by_side(measured) is None
