"""One message each, answers as they come, and an end to every wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.flwr_compat import set_message_id
from fedtune.wire.flower import PROFILE, TRAIN, from_record, to_record
from fedtune_server.exchange import Answer, exchange
from fedtune_server.simulation.grid import FaultHook, InProcessGrid

NAMES = ("a", "b", "c")


@contextmanager
def devices(
    fault: FaultHook | None = None, kind: str = TRAIN, workers: int = 1
) -> Iterator[InProcessGrid]:
    """Three devices that answer `<question> <place>`; the second fails where told to."""
    app = ClientApp()

    @app.train("lora")
    def train(message: Message, context: Context) -> Message:
        body, tensors = from_record(message.content, TRAIN)
        if body == b"fail at b" and context.node_config["partition-id"] == 1:
            raise MemoryError("no memory left\non this device")
        answer = body + b" %d" % context.node_config["partition-id"]
        return Message(to_record(kind, answer, tensors), reply_to=message)

    with InProcessGrid(app, 3, workers=workers, fault=fault) as grid:
        yield grid


def ask(grid: InProcessGrid, body: bytes = b"hello", deadline_s: float = 30.0) -> list[Answer]:
    contents = {name: to_record(TRAIN, body, b"tensors of " + name.encode()) for name in NAMES}
    nodes = dict(zip(NAMES, grid.get_node_ids(), strict=True))
    return list(exchange(grid, contents, nodes, kind=TRAIN, group="1", deadline_s=deadline_s))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_device_answers_its_own_message(workers: int) -> None:
    with devices(workers=workers) as grid:
        answers = ask(grid)
    expected = [
        Answer(name, b"hello %d" % i, b"tensors of " + name.encode())
        for i, name in enumerate(NAMES)
    ]
    assert sorted(answers, key=lambda answer: answer.device) == expected


def test_answers_come_one_by_one() -> None:
    order: list[str] = []
    with devices(lambda node, _: order.append(f"asked {node - 1000}")) as grid:
        contents = {name: to_record(TRAIN, b"") for name in NAMES}
        nodes = dict(zip(NAMES, grid.get_node_ids(), strict=True))
        for answer in exchange(grid, contents, nodes, kind=TRAIN, group="1", deadline_s=30.0):
            order.append(f"answer of {answer.device}")
    assert order == [
        line for i, name in enumerate(NAMES) for line in (f"asked {i}", f"answer of {name}")
    ]


def test_a_lost_device_fails_at_the_deadline_and_the_others_are_kept() -> None:
    started = time.monotonic()
    with devices(lambda node, _: "lost" if node == 1001 else None) as grid:
        answers = ask(grid, deadline_s=0.3)
    assert 0.25 <= time.monotonic() - started < 3
    assert [answer.device for answer in answers] == ["a", "c", "b"]
    assert "0.3 s" in answers[-1].failure
    assert answers[0].failure == answers[1].failure == ""


def test_an_answer_shortly_before_the_deadline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("fedtune_server.clock.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(
        "fedtune_server.clock.time.sleep", lambda s: clock.__setitem__(0, clock[0] + s)
    )

    class LateGrid:
        """All answers are there 20 ms before the deadline; counts how often it is asked."""

        asked = 0

        def push_messages(self, messages: list[Message]) -> list[str]:
            self.replies = []
            for message in messages:
                set_message_id(message, f"to {message.metadata.dst_node_id}")
                reply = Message(to_record(TRAIN, b"late"), reply_to=message)
                self.replies.append(reply)
            return [message.metadata.message_id for message in messages]

        def pull_messages(self, ids: list[str]) -> list[Message]:
            self.asked += 1
            return self.replies if clock[0] >= 99.98 else []

        def get_node_ids(self) -> list[int]:
            return [1, 2, 3]

    grid = LateGrid()
    assert [a.body for a in ask(grid, deadline_s=100.0)] == [b"late"] * 3  # type: ignore[arg-type]
    assert clock[0] < 100
    assert grid.asked < 150  # about one a second, but at the ends


def test_a_device_that_raises_fails_with_its_words_on_one_line() -> None:
    with devices() as grid:
        by_device = {answer.device: answer for answer in ask(grid, b"fail at b")}
    assert "no memory left" in by_device["b"].failure
    assert "\n" not in by_device["b"].failure
    assert by_device["a"].failure == by_device["c"].failure == ""


def test_a_device_that_is_offline_fails_at_once() -> None:
    started = time.monotonic()
    with devices(lambda node, _: "offline" if node == 1002 else None) as grid:
        answers = ask(grid)
    assert time.monotonic() - started < 5
    assert [bool(answer.failure) for answer in answers] == [False, False, True]


def test_an_answer_of_another_kind_is_a_failure() -> None:
    with devices(kind=PROFILE) as grid:
        answers = ask(grid)
    assert {a.failure for a in answers} == {
        "message: expected kind train.lora, got 'query.profile'"
    }


def test_a_reason_is_kept_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune_server.exchange.readable_reason", lambda reason: "x" * 10_000)
    with devices() as grid:
        by_device = {answer.device: answer for answer in ask(grid, b"fail at b")}
    assert by_device["b"].failure == "x" * 300
