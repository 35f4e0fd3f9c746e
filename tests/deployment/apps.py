"""Tiny apps that stand for fedtune's own at a coordinator (`server`) and at a site."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.errors import PolicyError
from fedtune.wire.flower import from_record, to_record

KIND = "query.profile"
WAIT_S = 90.0


def server(grid: Any, context: Context) -> None:
    """Asks every node once and writes what came to HOME/result.json; obeys HOME/plan.json."""
    home = Path(os.environ["FEDTUNE_COORDINATOR_HOME"])
    plan = json.loads((home / "plan.json").read_text("utf-8"))
    if plan.get("die"):
        os._exit(9)
    nodes = wait_for_nodes(grid, plan["nodes"])
    answers: dict[str, str] = {}
    for turn in range(plan.get("rounds", 1)):
        body = str(plan.get("body", "")).encode()
        messages = [
            Message(to_record(KIND, body, bytes(plan.get("bytes", 0))), node, KIND, ttl=WAIT_S)
            for node in nodes
        ]
        for reply in ask(grid, messages):
            if reply.has_error():
                answers[f"{turn}-error"] = f"{reply.error.code}: {reply.error.reason}"
            else:
                text, packed = from_record(reply.content, KIND)
                answers[f"{turn}-{reply.metadata.src_node_id}"] = (
                    f"{text.decode()} {len(packed or b'')}"
                )
    (home / "result.new").write_text(json.dumps(answers), encoding="utf-8")
    (home / "result.new").replace(home / "result.json")


def wait_for_nodes(grid: Any, count: int) -> list[int]:
    end = time.monotonic() + WAIT_S
    while len(nodes := [node.node_id for node in grid.get_nodes()]) < count:
        assert time.monotonic() < end, f"{len(nodes)} nodes of {count}"
        time.sleep(0.3)
    return nodes


def ask(grid: Any, messages: list[Message]) -> list[Message]:
    waiting = set(grid.push_messages(messages))
    replies: list[Message] = []
    end = time.monotonic() + WAIT_S
    while waiting and time.monotonic() < end:
        found = list(grid.pull_messages(waiting))
        replies += found
        waiting -= {reply.metadata.reply_to_message_id for reply in found}
        time.sleep(0.2)
    return replies


_interrupted = False


def client_app(home: Path) -> ClientApp:
    """Answers `SITE PID`, and what it is told to do in the message's body."""
    app = ClientApp()

    @app.query("profile")  # type: ignore[untyped-decorator]
    def profile(message: Message, context: Context) -> Message:
        global _interrupted
        body, packed = from_record(message.content, KIND)
        order = body.decode()
        if order == "refuse":
            raise PolicyError("this site rests at night")
        if order == "raise":
            raise ValueError("boo")
        if order == "die" and not (home / "died").exists():
            (home / "died").touch()
            os._exit(9)
        if order == "sleep":
            (home / "sleeping").touch()
            _interrupted = False
            while not _interrupted:
                time.sleep(0.05)
            raise PolicyError("interrupted")
        return Message(
            to_record(KIND, f"{home.name} {os.getpid()}".encode(), packed), reply_to=message
        )

    return app


def interrupt(home: Path, reason: str) -> None:
    global _interrupted
    _interrupted = True
