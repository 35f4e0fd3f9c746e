"""What becomes of a message's failure, without a node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedtune.deploy.exit_codes import EXIT_RESTART, EXIT_WANTED
from fedtune.errors import DeploymentError, PolicyError
from fedtune.flwr_compat import become_coordinator, readable_reason
from fedtune_client import executor
from fedtune_client.executor import LAST_REPLY_S, App, Executor, load
from tests.deployment.running import TASK


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Keep the tests' own process alive."""
    told: list[float] = []
    monkeypatch.setattr(executor, "end_within", told.append)
    return told


def reply_of(
    tmp_path: Path, error: Exception | None, config: dict[str, Any] | None = None
) -> tuple[Message, Executor]:
    def handle(message: Message, context: Context) -> Message:
        if error is not None:
            raise error
        return Message(RecordDict(), reply_to=message)

    become_coordinator(5)
    message = Message(RecordDict(), 1000, "train.lora", ttl=9.0)
    ours = {"fedtune-task": json.dumps(TASK)}
    context = Context(
        run_id=5,
        node_id=1000,
        node_config={},
        state=RecordDict(),
        run_config=ours if config is None else config,
    )
    worker = Executor("127.0.0.1:1", "s", App(handle, lambda: None, print, lambda: None), tmp_path)
    return worker._reply(message, context), worker


def test_a_good_reply_is_handed_on(tmp_path: Path) -> None:
    reply, worker = reply_of(tmp_path, None)
    assert not reply.has_error()
    assert worker._code == EXIT_WANTED


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PolicyError("this site rests at night"), "this site rests at night"),
        (ValueError("boo"), "ValueError: boo"),
        (MemoryError("too large"), "MemoryError: too large"),
    ],
)
def test_a_failure_becomes_an_error_reply_with_its_words(
    tmp_path: Path, error: Exception, line: str
) -> None:
    reply, _ = reply_of(tmp_path, error)
    assert readable_reason(reply.error.reason) == line


def test_out_of_memory_asks_for_a_new_process(tmp_path: Path, ends: list[float]) -> None:
    _, worker = reply_of(tmp_path, MemoryError())
    assert ends == [LAST_REPLY_S]
    assert worker._code == EXIT_RESTART
    assert worker._stopping.is_set()


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such timer")
def test_a_process_that_waits_for_ever_is_ended() -> None:
    code = (
        "import threading\n"
        "from fedtune_client.executor import end_within\n"
        "end_within(0.2)\n"
        "threading.Event().wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGALRM


def test_a_run_that_is_not_ours_reaches_no_app(tmp_path: Path) -> None:
    reply, _ = reply_of(tmp_path, AssertionError("reached"), {"other": "run"})
    assert "expected a run of fedtune" in readable_reason(reply.error.reason)


def test_a_module_without_an_app_is_named() -> None:
    with pytest.raises(DeploymentError, match="no_such_module"):
        load("no_such_module", Path())
    with pytest.raises(DeploymentError, match="client_app"):
        load("json", Path())


def test_an_order_to_stop_is_never_before_the_beginning_of_its_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class GoneAtOnce:
        def __init__(self, address: str, secret: str, token: str, gone: Callable[[], None]) -> None:
            gone()

        def receive(self) -> tuple[Message, Context]:
            raise RuntimeError("its node has forgotten it")

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr("fedtune.flwr_compat.ClientTask", GoneAtOnce)
    app = App(print, lambda: told.append("begin"), told.append, lambda: None)
    worker = Executor("127.0.0.1:1", "s", app, tmp_path)
    with pytest.raises(RuntimeError):
        worker._work("a token")
    assert told == ["begin", "the coordinator no longer waits for it", "closed"]
    told.clear()
    worker._stopping.set()
    with pytest.raises(RuntimeError):
        worker._work("a token")
    assert told[:2] == ["begin", "the site's executor is being stopped"]


def test_a_module_may_offer_to_be_interrupted(tmp_path: Path) -> None:
    app = load("tests.deployment.apps", tmp_path)
    app.begin()
    app.interrupt("now")
    app.close()
