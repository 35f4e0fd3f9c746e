"""Flower's simulation engine runs the same apps; without Ray the error says what to install."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
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


SCRIPT = """
import json, time
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedtune.wire.flower import TRAIN, from_record, to_record
from fedtune_server.simulation.ray import run_ray

found, server, client = [], ServerApp(), ClientApp()

@client.train("lora")
def lora(message, context):
    body, tensors = from_record(message.content, TRAIN)
    if body == b"fail" and context.node_config["partition-id"] == 1:
        raise ValueError("boo")
    return Message(to_record(TRAIN, body + b"!", tensors), reply_to=message)

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.05)
    for body in (b"go", b"fail"):
        nodes = grid.get_node_ids()
        sent = [Message(to_record(TRAIN, body, bytes(100)), n, TRAIN, ttl=60) for n in nodes]
        replies = grid.send_and_receive(sent, timeout=60)
        found.append(sorted(
            from_record(r.content, TRAIN)[0].decode() if r.has_content() else r.error.reason
            for r in replies
        ))

run_ray(server, client, 3, threads=1, workers=2)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="needs Ray: pip install 'fedtune[ray]'")
def test_results_reach_the_caller_and_failures_are_one_line() -> None:
    # In a process of its own, because Ray leaves open files behind.
    command = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found == [["go!"] * 3, ["boo", "fail!", "fail!"]]


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
