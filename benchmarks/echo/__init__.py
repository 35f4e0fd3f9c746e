"""Apps that send an adapter to every site and back: the way alone, without training.

What is sent is made up and different for each site and each round, as adapters are; a site returns
other bytes than it was sent. `form` is `packed`: one array, as fedtune sends it; or `tensors`: an
array of each tensor, as Flower's own examples do.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.wire.flower import TRAIN, from_record, to_record

ORDER, RESULT = "echo.json", "echo-result.json"
PATIENCE_S = 1800.0
_POLL_S = 0.5
_INVERTED = bytes(range(255, -1, -1))


def server(grid: Any, context: Context) -> None:
    """Play the order of HOME/echo.json; what the rounds took goes to HOME/echo-result.json."""
    home = Path(os.environ["FEDTUNE_COORDINATOR_HOME"])
    order = json.loads((home / ORDER).read_text(encoding="utf-8"))
    nodes = _nodes(grid, order["sites"])
    rounds = [_round(grid, nodes, order, number) for number in range(order["rounds"])]
    made = home / f"{RESULT}.new"
    made.write_text(json.dumps(rounds), encoding="utf-8")
    made.replace(home / RESULT)


def _nodes(grid: Any, count: int) -> list[int]:
    end = time.monotonic() + PATIENCE_S
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(nodes)} sites of {count}")
        time.sleep(_POLL_S)
    return nodes


def _round(grid: Any, nodes: Sequence[int], order: Any, number: int) -> dict[str, float]:
    """One message to each site and back: seconds, and when they began and ended."""
    rng = np.random.default_rng(number)
    began, digests = time.time(), {}
    contents = {}
    for node in nodes:
        sent = rng.bytes(4 * sum(order["numbers"]))
        digests[node] = _digest(sent)
        contents[node] = _record(order["form"], sent, order["numbers"])
    del sent
    messages = [
        Message(contents.pop(node), node, TRAIN, ttl=PATIENCE_S, group_id=str(number))
        for node in nodes
    ]
    ready = time.time()
    waiting = set(grid.push_messages(messages))
    messages.clear()
    pushed = time.time()
    while waiting:
        if time.time() > began + PATIENCE_S:
            raise TimeoutError(f"{len(waiting)} sites did not answer")
        # One at a time, as a coordinator fetches replies of this size.
        for reply in itertools.chain.from_iterable(grid.pull_messages([i]) for i in list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                raise ValueError(reply.error.reason)
            node = reply.metadata.src_node_id
            text = _bytes(order["form"], reply.content)
            if _digest(_changed(text)) != digests[node]:
                raise ValueError(f"node {node} returned something else")
        time.sleep(_POLL_S)
    return {"began": ready, "pushed": pushed, "ended": time.time()}


def client_app(home: Path) -> ClientApp:
    """Returns what it was sent, with every byte changed."""
    app = ClientApp()

    @app.train("lora")
    def train(message: Message, context: Context) -> Message:
        form = "tensors" if "form" in message.content else "packed"
        text = _bytes(form, message.content)
        numbers = [len(a.data) // 4 for a in _arrays(message.content)] if form == "tensors" else []
        message.content = RecordDict()
        return Message(_record(form, _changed(text), numbers), reply_to=message)

    return app


def _record(form: str, content: bytes, numbers: Sequence[int]) -> RecordDict:
    if form == "packed":
        return to_record(TRAIN, b"", content)
    arrays, first, view = {}, 0, memoryview(content)
    for index, count in enumerate(numbers):
        data = bytes(view[first : first + 4 * count])
        arrays[f"{index:04d}"] = Array("float32", (count,), "raw", data)
        first += 4 * count
    return RecordDict({"tensors": ArrayRecord(arrays), "form": ConfigRecord({"form": form})})


def _bytes(form: str, record: RecordDict) -> bytes:
    if form == "packed":
        return from_record(record, TRAIN)[1] or b""
    return b"".join(array.data for array in _arrays(record))


def _arrays(record: RecordDict) -> list[Array]:
    return [array for _, array in sorted(record.array_records["tensors"].items())]


def _changed(content: bytes) -> bytes:
    return content.translate(_INVERTED)  # in one step, so that no third copy counts


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
