"""Flower's simulation engine runs the same apps; without Ray the error says what to install."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterable

import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import MissingExtraError
from fedtune.wire.flower import TRAIN, from_record, to_record
from fedtune_server.simulation import ray as ray_module
from fedtune_server.simulation.grid import InProcessGrid
from fedtune_server.simulation.ray import run_ray

RAY = importlib.util.find_spec("ray") is not None


def client() -> ClientApp:
    app = ClientApp()

    @app.train("lora")
    def lora(message: Message, context: Context) -> Message:
        body, tensors = from_record(message.content, TRAIN)
        if body == b"fail" and context.node_config["partition-id"] == 1:
            raise ValueError("boo")
        return Message(to_record(TRAIN, body + b"!", tensors), reply_to=message)

    return app


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_error_names_the_extra_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'fedtune\[ray\]'"):
        run_ray(ServerApp(), client(), 2, threads=1, workers=1)


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="needs Ray: pip install 'fedtune[ray]'")
@pytest.mark.filterwarnings("ignore")
def test_results_reach_the_caller_and_failures_are_one_line() -> None:
    found: list[object] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < 3:
            time.sleep(0.05)
        for body in (b"go", b"fail"):
            messages = [
                Message(to_record(TRAIN, body, bytes(100)), node, TRAIN, ttl=60)
                for node in grid.get_node_ids()
            ]
            replies = list(grid.send_and_receive(messages, timeout=60))
            found.append(
                sorted(
                    str(from_record(r.content, TRAIN)[0]) if r.has_content() else r.error.reason
                    for r in replies
                )
            )

    run_ray(server, client(), 3, threads=1, workers=2)
    assert found == [["b'go!'"] * 3, ["b'fail!'", "b'fail!'", "boo"]]


def test_a_coordinator_that_waits_is_interrupted() -> None:
    stop, done = threading.Event(), threading.Event()
    server = ServerApp()
    ended: list[str] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            message = Message(to_record(TRAIN, b""), 1000, TRAIN)
            grid.send_and_receive([message])
        except KeyboardInterrupt:
            ended.append("interrupted")
            raise

    wrapped = ray_module._interruptible(server, stop, done)
    with InProcessGrid(client(), 1, fault=lambda node, message: "lost") as grid:
        thread = threading.Thread(target=lambda: wrapped(grid=grid, context=None))
        thread.start()
        time.sleep(0.1)
        assert not done.is_set()
        stop.set()
        thread.join(timeout=5)
    assert done.is_set()
    assert ended == ["interrupted"]


def test_a_traceback_as_reason_is_logged_and_shortened(caplog: pytest.LogCaptureFixture) -> None:
    class Wrapped(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            for reply in replies:
                text = "\x1b[36mray::x\n\nException ClientAppException occurred. Message: boo'>"
                reply.error = Error(reply.error.code, text)
            return replies

    with Wrapped(client(), 1, fault=lambda node, message: "offline") as inner:
        grid = ray_module._InterruptibleGrid(inner, threading.Event())
        reply = grid.send_and_receive([Message(to_record(TRAIN, b""), 1000, TRAIN)])[0]
    assert reply.error.reason == "boo"
    assert "ray::x" in caplog.text
