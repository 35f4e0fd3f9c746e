"""The in-process grid runs real Flower apps as a network would, without one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import PlanError
from fedtune.flwr_compat import SUPERLINK_NODE_ID, ErrorCode
from fedtune.wire.flower import TRAIN, from_record, to_record
from fedtune.wire.tensors import pack_tensors, unpack_tensors
from fedtune_server.simulation.grid import FaultHook, InProcessGrid, run_inprocess

Handler = Callable[[Message, Context], Message]
SHAPES = {"x": (3,)}


def echo(message: Message, context: Context) -> Message:
    body, tensors = from_record(message.content, TRAIN)
    return Message(to_record(TRAIN, body + b"!", tensors), reply_to=message)


def app(handler: Handler = echo) -> ClientApp:
    client = ClientApp()
    client.train("lora")(handler)
    return client


def ask(grid: Grid, body: bytes = b"hello", ttl: float = 60.0) -> list[Message]:
    """One message for every node."""
    return [
        Message(to_record(TRAIN, body), dst_node_id=node, message_type=TRAIN, ttl=ttl)
        for node in grid.get_node_ids()
    ]


def bodies(replies: list[Message]) -> list[bytes]:
    return [from_record(reply.content, TRAIN)[0] for reply in replies]


@pytest.fixture(params=[1, 4])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def start(workers: int) -> Iterator[Callable[..., InProcessGrid]]:
    grids: list[InProcessGrid] = []

    def make(
        handler: Handler = echo, devices: int = 3, fault: FaultHook | None = None
    ) -> InProcessGrid:
        grids.append(InProcessGrid(app(handler), devices, workers=workers, fault=fault))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


Start = Callable[..., InProcessGrid]


def test_every_device_answers_its_own_message(start: Start) -> None:
    grid = start()
    messages = ask(grid)
    replies = grid.send_and_receive(messages)
    sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    assert bodies(replies) == [b"hello!"] * 3
    for reply in replies:
        assert sent.pop(reply.metadata.reply_to_message_id) == reply.metadata.src_node_id
    assert not sent


def test_nodes_are_the_same_in_every_run_and_configured_like_flowers(start: Start) -> None:
    found = {}

    def record(message: Message, context: Context) -> Message:
        found[context.node_id] = dict(context.node_config)
        return echo(message, context)

    grid = start(record)
    grid.send_and_receive(ask(grid))
    assert grid.get_node_ids() == [1000, 1001, 1002]
    assert [node.node_id for node in grid.get_nodes()] == [1000, 1001, 1002]
    assert found == {1000 + i: {"partition-id": i, "num-partitions": 3} for i in range(3)}


def test_a_devices_state_is_kept_from_message_to_message_and_is_its_own(start: Start) -> None:
    def count(message: Message, context: Context) -> Message:
        seen = int(context.state["n"]["n"]) if "n" in context.state else 0
        context.state["n"] = ConfigRecord({"n": seen + 1 + context.node_id - 1000})
        return Message(to_record(TRAIN, str(context.state["n"]["n"]).encode()), reply_to=message)

    grid = start(count)
    grid.send_and_receive(ask(grid))
    assert sorted(bodies(grid.send_and_receive(ask(grid)))) == [b"2", b"4", b"6"]


def test_device_and_coordinator_share_no_object(start: Start) -> None:
    seen = []

    def spoil(message: Message, context: Context) -> Message:
        seen.append(message.content)
        reply = echo(message, context)
        message.content["fedtune"]["body"] = b"spoiled"
        return reply

    grid = start(spoil, devices=1)
    messages = ask(grid)
    grid.send_and_receive(messages)
    assert seen[0] is not messages[0].content
    assert from_record(messages[0].content, TRAIN)[0] == b"hello"


def test_one_worker_takes_devices_in_the_order_of_pushing_in_the_callers_thread() -> None:
    order = []

    def record(message: Message, context: Context) -> Message:
        order.append((context.node_id, threading.current_thread()))
        return echo(message, context)

    with InProcessGrid(app(record), 4) as grid:
        grid.send_and_receive(list(reversed(ask(grid))))
    assert order == [(1000 + i, threading.current_thread()) for i in (3, 2, 1, 0)]


def test_pulling_gives_each_reply_as_it_comes() -> None:
    with InProcessGrid(app(), 3) as grid:
        ids = grid.push_messages(ask(grid))
        counts = [len(grid.pull_messages(ids)) for _ in range(4)]
    assert counts == [1, 1, 1, 0]


def test_several_workers_run_devices_together_but_one_message_per_device() -> None:
    both = threading.Barrier(2, timeout=5)
    active: dict[int, int] = {}

    def meet(message: Message, context: Context) -> Message:
        active[context.node_id] = active.get(context.node_id, 0) + 1
        assert active[context.node_id] == 1
        both.wait()
        active[context.node_id] -= 1
        return echo(message, context)

    with InProcessGrid(app(meet), 2, workers=4) as grid:
        replies = grid.send_and_receive(ask(grid) + ask(grid), timeout=10)
    assert bodies(replies) == [b"hello!"] * 4


def test_an_exception_of_a_device_becomes_an_error_reply_and_is_logged(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(message: Message, context: Context) -> Message:
        if context.node_id == 1001:
            raise ValueError("boo")
        return echo(message, context)

    grid = start(fail)
    replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(ask(grid))}
    assert replies[1000].has_content()
    assert replies[1001].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert replies[1001].error.reason == "<class 'ValueError'>:<'boo'>"
    assert "Traceback" in caplog.text
    assert "ValueError: boo" in caplog.text


def test_a_refusal_on_purpose_is_no_error_in_the_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(message: Message, context: Context) -> Message:
        raise PlanError("needs 3 GB, has 2 GB")

    grid = start(refuse, devices=1)
    with caplog.at_level(logging.INFO):
        replies = grid.send_and_receive(ask(grid))
    assert "needs 3 GB" in replies[0].error.reason
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_something_else_than_a_message_as_reply_is_an_error_reply(start: Start) -> None:
    grid = start(lambda message, context: None, devices=1)
    replies = grid.send_and_receive(ask(grid))
    assert replies[0].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def test_an_offline_device_is_reported_by_the_link(start: Start) -> None:
    grid = start(fault=lambda node, message: "offline" if node == 1001 else None)
    messages = ask(grid)
    replies = {r.metadata.reply_to_message_id: r for r in grid.send_and_receive(messages)}
    offline = replies[messages[1].metadata.message_id]
    assert offline.error.code == ErrorCode.NODE_UNAVAILABLE
    assert offline.metadata.src_node_id == SUPERLINK_NODE_ID
    assert replies[messages[0].metadata.message_id].has_content()


def test_a_lost_message_keeps_its_sender_waiting_until_its_time_to_live_is_over(
    start: Start,
) -> None:
    grid = start(devices=1, fault=lambda node, message: "lost")
    assert grid.send_and_receive(ask(grid), timeout=0.05) == []
    started = time.monotonic()
    replies = grid.send_and_receive(ask(grid, ttl=0.2))
    assert time.monotonic() - started >= 0.2
    assert replies[0].error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert replies[0].metadata.src_node_id == SUPERLINK_NODE_ID


def test_a_device_slower_than_the_time_to_live_is_late(start: Start) -> None:
    calls = []

    def record(message: Message, context: Context) -> Message:
        calls.append(context.node_id)
        time.sleep(0.15 if context.node_id == 1001 else 0)
        return echo(message, context)

    grid = start(record, devices=3, fault=lambda node, message: 30.0 if node == 1000 else None)
    messages = ask(grid, ttl=0.1)
    replies = {r.metadata.reply_to_message_id: r for r in grid.send_and_receive(messages)}
    found = [replies[message.metadata.message_id] for message in messages]
    assert [reply.has_content() for reply in found] == [False, False, True]
    assert {reply.error.code for reply in found[:2]} == {ErrorCode.MESSAGE_UNAVAILABLE}
    assert "no reply within the 0.1 s" in found[0].error.reason
    assert 1000 not in calls


def test_waiting_ends_at_the_timeout_and_withdraws_what_has_not_started() -> None:
    calls = []

    def slow(message: Message, context: Context) -> Message:
        calls.append(context.node_id)
        time.sleep(0.1)
        return echo(message, context)

    with InProcessGrid(app(slow), 5) as grid:
        messages = ask(grid)
        assert len(grid.send_and_receive(messages, timeout=0.15)) == len(calls) == 2
        assert grid.pull_messages([message.metadata.message_id for message in messages]) == []
        assert len(calls) == 2


def test_an_interrupt_of_a_device_at_work_leaves_the_grid_at_once() -> None:
    def interrupted(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = InProcessGrid(app(interrupted), 2)
    with pytest.raises(KeyboardInterrupt), grid:
        grid.send_and_receive(ask(grid))


def test_closing_stops_the_workers(workers: int) -> None:
    before = threading.active_count()
    grid = InProcessGrid(app(), 2, workers=workers)
    assert threading.active_count() == before + (workers if workers > 1 else 0)
    grid.close()
    assert threading.active_count() == before


def test_a_message_to_an_unknown_node_is_an_error(start: Start) -> None:
    grid = start()
    message = Message(RecordDict(), dst_node_id=7, message_type=TRAIN)
    with pytest.raises(ValueError, match="no device has the node id 7"):
        grid.push_messages([message])


def test_bytes_of_both_ways_are_counted(start: Start) -> None:
    def answer_with_much(message: Message, context: Context) -> Message:
        return Message(to_record(TRAIN, b"", bytes(5000)), reply_to=message)

    grid = start(answer_with_much, devices=2)
    grid.send_and_receive(ask(grid, bytes(1000)))
    assert 2000 < grid.bytes_down < 3000
    assert 10_000 < grid.bytes_up < 11_000


def test_a_coordinator_and_its_devices_run_to_the_end(workers: int) -> None:
    result: dict[str, object] = {}

    def double(message: Message, context: Context) -> Message:
        body, tensors = from_record(message.content, TRAIN)
        assert tensors is not None
        value = unpack_tensors(tensors, SHAPES)["x"] * 2
        factor = context.run_config["factor"]
        packed = pack_tensors({"x": value * np.float32(factor)}, "fp32")
        return Message(to_record(TRAIN, body, packed), reply_to=message)

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        value = np.ones(3, dtype=np.float32)
        for round in range(3):
            record = to_record(TRAIN, b"", pack_tensors({"x": value}, "fp32"))
            messages = [
                Message(record, dst_node_id=node, message_type=TRAIN, group_id=str(round))
                for node in grid.get_node_ids()
            ]
            replies = list(grid.send_and_receive(messages))
            parts = [from_record(reply.content, TRAIN)[1] for reply in replies]
            value = np.mean([unpack_tensors(part, SHAPES)["x"] for part in parts], axis=0)
        result["x"], result["config"] = value, dict(context.run_config)

    run_inprocess(server, app(double), 4, workers=workers, run_config={"factor": 1.5})
    np.testing.assert_array_equal(result["x"], np.full(3, 27.0))
    assert result["config"] == {"factor": 1.5}


def test_an_exception_of_the_coordinator_leaves_the_call() -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        raise PlanError("no plan fits")

    with pytest.raises(PlanError, match="no plan fits"):
        run_inprocess(server, app(), 2)


class Choir:
    """Answers in one voice all messages whose bodies begin alike; one device can be unwell."""

    most = 3

    def __init__(self, unwell: int | None = None) -> None:
        self.sang: list[int] = []
        self._unwell = unwell

    def key(self, message: Message) -> Hashable:
        return from_record(message.content, TRAIN)[0][:1] or None

    def __call__(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        self.sang.append(len(messages))
        assert [m.metadata.dst_node_id for m in messages] == [c.node_id for c in contexts]
        return [
            PlanError("hoarse") if c.node_id == self._unwell else echo(m, c)
            for m, c in zip(messages, contexts, strict=True)
        ]


def test_messages_of_equal_keys_are_answered_together_and_no_more_than_allowed() -> None:
    choir = Choir()
    with InProcessGrid(app(), 5, together=choir) as grid:
        assert bodies(grid.send_and_receive(ask(grid))) == [b"hello!"] * 5
    assert choir.sang == [3, 2]


def test_a_message_without_a_key_or_a_fellow_goes_the_ordinary_way() -> None:
    choir = Choir()
    with InProcessGrid(app(), 2, together=choir) as grid:
        messages = [Message(to_record(TRAIN, body), node, TRAIN) for node, body in
                    zip(grid.get_node_ids(), (b"", b"alone"), strict=True)]  # fmt: skip
        assert sorted(bodies(grid.send_and_receive(messages))) == [b"!", b"alone!"]
    assert choir.sang == []


def test_a_device_that_fails_among_others_fails_alone() -> None:
    with InProcessGrid(app(), 3, together=Choir(unwell=1001)) as grid:
        replies = grid.send_and_receive(ask(grid))
    (failed,) = [reply for reply in replies if reply.has_error()]
    assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "hoarse" in str(failed.error.reason)
    assert bodies([reply for reply in replies if not reply.has_error()]) == [b"hello!"] * 2


def test_messages_that_take_longer_together_than_all_their_time_are_late() -> None:
    class Slow(Choir):
        def __call__(
            self, messages: Sequence[Message], contexts: Sequence[Context]
        ) -> list[Message | Exception]:
            time.sleep(0.2)
            return super().__call__(messages, contexts)

    with InProcessGrid(app(), 2, together=Slow()) as grid:
        replies = grid.send_and_receive(ask(grid, ttl=0.05))
        assert [reply.error.code for reply in replies] == [ErrorCode.MESSAGE_UNAVAILABLE] * 2
        assert len(grid.send_and_receive(ask(grid, ttl=5.0))) == 2


@pytest.mark.parametrize("several", [True, False])
def test_with_workers_or_faults_devices_take_turns(several: bool) -> None:
    choir = Choir()
    fault = None if several else lambda node, message: None
    with InProcessGrid(app(), 3, workers=2 if several else 1, fault=fault, together=choir) as grid:
        assert len(grid.send_and_receive(ask(grid))) == 3
    assert choir.sang == []
