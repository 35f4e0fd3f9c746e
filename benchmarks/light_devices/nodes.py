"""`python -m light_devices.nodes ORDER.json`: some light devices at a real link, a thread each.

Each has its own key, its own connection and its own heartbeat, and asks for messages as often as
the link wants. The order names the link, its CA, the folder of the base, and each device's
name and key. SIGTERM ends the process, which then writes how many requests it made, of which kind,
and how long they took, beside the order (`ORDER.json.done`).
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, RecordDict

from fedtune.errors import FedtuneError
from fedtune.flwr_compat import (
    LightNode,
    become_coordinator,
    error_reply,
    light_node,
    watch_node_requests,
)
from fedtune.model.shapes import read_shapes
from fedtune_client.node import FLOWERS_POLL_S, POLL_HEADER, wanted_poll_s
from light_devices import LightFleet

_APART_S = 0.1
"""Between two devices that connect: a fleet does not start in the same moment."""

_stop = threading.Event()
_log = logging.getLogger("light_devices")


class Requests:
    """Counts requests by their path, with the seconds that each took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._took: dict[str, list[float]] = defaultdict(list)
        self.poll_s = FLOWERS_POLL_S

    def __call__(
        self, request: httpx.Request, send: Callable[[], httpx.Response]
    ) -> httpx.Response:
        began = time.monotonic()
        answer = send()
        name = request.url.path.rpartition("/")[2]
        if answer.status_code != 200:
            name = f"{name} {answer.status_code}"
        with self._lock:
            self._took[name].append(time.monotonic() - began)
        self.poll_s = wanted_poll_s(answer.headers.get(POLL_HEADER, ""), self.poll_s)
        return answer

    def table(self) -> Mapping[str, tuple[int, float, float]]:
        """Kind -> how many, their median and their 95th percentile in seconds."""
        with self._lock:
            return {
                name: (len(took), *map(float, np.quantile(took, (0.5, 0.95))))
                for name, took in self._took.items()
            }


def main(path: Path) -> None:
    """Play the devices of an order until SIGTERM."""
    order = json.loads(path.read_text(encoding="utf-8"))
    names = [device["name"] for device in order["devices"]]
    model = read_shapes(Path(order["base"]), ("all-linear",))
    fleet = LightFleet(len(names), model, names)
    requests = Requests()
    watch_node_requests(requests)
    become_coordinator(0)
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())
    threads = []
    for number, device in enumerate(order["devices"]):
        arguments = (order, device, number, fleet.app(), requests)
        threads.append(threading.Thread(target=play, args=arguments, daemon=True))
        threads[-1].start()
        _stop.wait(_APART_S)
    _stop.wait()
    done = {"requests": requests.table(), "answers_cpu_s": fleet.cpu_s}
    path.with_name(path.name + ".done").write_text(json.dumps(done), encoding="utf-8")
    os._exit(0)  # connections are not wound up one by one


def play(
    order: Mapping[str, Any], device: Mapping[str, str], number: int, app: Any, requests: Requests
) -> None:
    """One device, until the end."""
    key = load_ssh_private_key(device["key"].encode("ascii"), None)
    context = Context(0, 0, {"partition-id": number}, RecordDict(), {}, 0)
    with light_node(order["server"], order["ca"], key) as node:
        while not _stop.is_set():
            if not answer(node, app, context):
                _stop.wait(random.uniform(0.9, 1.1) * requests.poll_s)


def answer(node: LightNode, app: Any, context: Context) -> bool:
    """Answer the next message; False: there is none, or the link is busy."""
    try:
        message = node.receive()
        if message is None:
            return False
        try:
            reply = app(message, context)
        except (ValueError, FedtuneError) as error:  # of Flower, or ours
            reply = error_reply(message, error)
        node.reply(reply)
    except httpx.HTTPError as error:
        _log.warning("%s", error)
        return False
    return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(Path(sys.argv[1]))
