"""Devices that take virtual seconds: their replies are there when they are due, and no sooner."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.records import DevicePlan, LoraScale, MatrixPlan
from fedtune.wire.flower import PROFILE, TRAIN, to_record
from fedtune.wire.messages import OptimizerSpec, TrainInstruction, encode_train_instruction
from fedtune_server.clock import VirtualClock
from fedtune_server.simulation.delayed import DelayedGrid
from fedtune_server.simulation.delays import delays, factor

SECONDS = (3.0, 1.0, 2.0)
Grids = Callable[..., DelayedGrid]


@pytest.fixture
def worked() -> list[int]:
    """Nodes, in the order in which they did their work."""
    return []


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def grid_of(worked: list[int], clock: VirtualClock) -> Grids:
    def make(together: Any = None) -> DelayedGrid:
        app = ClientApp()

        @app.train("lora")
        @app.query("profile")
        def answer(message: Message, context: Context) -> Message:
            worked.append(context.node_id)
            return Message(to_record(TRAIN, b"done"), reply_to=message)

        def delay(message: Message) -> float | None:
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            return SECONDS[node - 1000] if kind == TRAIN else None

        return DelayedGrid(app, 3, delay=delay, clock=clock, together=together)

    return make


def push(grid: DelayedGrid, nodes: Sequence[int] = (1000, 1001, 1002), kind: str = TRAIN) -> list:  # type: ignore[type-arg]
    messages = [
        Message(to_record(kind, b"work"), dst_node_id=node, message_type=kind, ttl=0.01)
        for node in nodes
    ]
    return grid.push_messages(messages)


def nodes(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_a_reply_is_there_when_it_is_due_and_no_sooner(
    grid_of: Grids, clock: VirtualClock, worked: list[int]
) -> None:
    grid = grid_of()
    ids = push(grid)
    assert grid.pull_messages(ids) == []
    assert worked == []
    arrived = []
    for _ in range(3):
        clock.wait(1.0, 100.0)
        arrived.append((clock.now(), nodes(grid.pull_messages(ids))))
    assert arrived == [(1.0, [1001]), (2.0, [1002]), (3.0, [1000])]


def test_replies_come_in_the_order_in_which_they_are_due(
    grid_of: Grids, clock: VirtualClock
) -> None:
    grid = grid_of()
    ids = push(grid)
    while clock.now() < 3.0:
        clock.wait(1.0, 3.0)
    assert nodes(grid.pull_messages(ids)) == [1001, 1002, 1000]


def test_what_nobody_asks_for_is_never_computed(
    grid_of: Grids, clock: VirtualClock, worked: list[int]
) -> None:
    grid = grid_of()
    ids = push(grid)
    clock.wait(1.0, 100.0)
    clock.wait(1.0, 100.0)
    grid.pull_messages(ids[2:])
    assert worked == [1002]


def test_a_device_does_one_message_after_the_other(grid_of: Grids, clock: VirtualClock) -> None:
    grid = grid_of()
    first, second = push(grid, [1001]), push(grid, [1001])
    clock.wait(1.0, 100.0)
    assert len(grid.pull_messages([*first, *second])) == 1
    clock.wait(1.0, 100.0)
    assert clock.now() == 2.0
    assert len(grid.pull_messages(second)) == 1


def test_what_takes_no_time_is_answered_at_once(grid_of: Grids, clock: VirtualClock) -> None:
    grid = grid_of()
    push(grid)
    assert nodes(grid.pull_messages(push(grid, kind=PROFILE))) == [1000, 1001, 1002]
    assert clock.now() == 0.0


def test_devices_that_work_together_are_still_due_one_by_one(
    grid_of: Grids, clock: VirtualClock
) -> None:
    passes: list[list[int]] = []

    class Together:
        most = 8

        def key(self, message: Message) -> str:
            return "alike"

        def __call__(
            self, messages: Sequence[Message], contexts: Sequence[Context]
        ) -> list[Message]:
            passes.append([context.node_id for context in contexts])
            return [Message(to_record(TRAIN, b"done"), reply_to=m) for m in messages]

    grid = grid_of(Together())
    ids = push(grid)
    arrived = []
    for _ in range(3):
        clock.wait(1.0, 100.0)
        arrived += nodes(grid.pull_messages(ids))
    assert passes == [[1001, 1000, 1002]]
    assert arrived == [1001, 1002, 1000]


# ---------------------------------------------------------------- how long


def order(device: str, round: int, seconds: float) -> Message:
    plan = DevicePlan(device, (MatrixPlan("m", 2, "fp32"),), 1, 1, 8, 1, seconds=seconds)
    body = encode_train_instruction(
        TrainInstruction(
            run="run", round=round, base_digest="d" * 64, plan=plan, optimizer=OptimizerSpec(),
            seed=0, tensors_digest="0" * 64, evaluate=False, scale=LoraScale(1.0), labels=(),
            codec="fp32",
        )
    )  # fmt: skip
    return Message(to_record(TRAIN, body, b""), dst_node_id=1000, message_type=TRAIN)


def test_a_device_takes_its_planned_seconds_times_a_factor_of_device_and_round(
    grid_of: Grids,
) -> None:
    grid_of()  # lets this process make messages
    delay = delays("lognormal", 1.0, seed=3)
    found = delay(order("east", 4, 10.0))
    assert found == 10.0 * factor("lognormal", 1.0, 3, "east", 4)
    assert found != delay(order("east", 4, 10.0))  # asked again in the same round
    assert found == delays("lognormal", 1.0, seed=3)(order("east", 4, 10.0))
    others = [delay(order("east", 5, 10.0)), delay(order("west", 4, 10.0))]
    assert len({found, *others, delays("lognormal", 1.0, seed=4)(order("east", 4, 10.0))}) == 4
    question = Message(to_record(PROFILE, b""), dst_node_id=1000, message_type=PROFILE)
    assert delay(question) is None


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_factors_have_a_median_of_one_and_a_tail_as_heavy_as_the_spread_says(
    spread: float,
) -> None:
    names = [f"device-{i}" for i in range(4000)]
    normal = sorted(factor("lognormal", spread, 0, name, 1) for name in names)
    pareto = sorted(factor("pareto", spread, 0, name, 1) for name in names)
    assert statistics.median(normal) == pytest.approx(1.0, rel=0.1)
    assert statistics.median(pareto) == pytest.approx(1.0, rel=0.1)
    assert normal[int(0.975 * 4000)] == pytest.approx(2.718281828 ** (1.96 * spread), rel=0.25)
    # One in 20 takes (2 * 0.05)^-spread or more; none takes less than 2^-spread.
    assert pareto[int(0.95 * 4000)] == pytest.approx(10.0**spread, rel=0.25)
    assert pareto[0] >= 2.0**-spread
