"""A fleet on Flower's simulation engine: the devices run in Ray's processes, several at a time.

The coordinator runs in a thread of this process, so what it writes to a shared object or hands to
a callback is here when the run is over. A ClientApp is copied to the processes, so a device keeps
between messages only what it puts into its `Context.state`.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
import warnings
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import MissingExtraError
from fedtune.flwr_compat import NodeInfo, Run, quiet_flower, readable_reason

_POLL_S = 0.1
_log = logging.getLogger(__name__)


def run_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    devices: int,
    *,
    threads: int,
    workers: int,
    accelerators_per_device: float = 0.0,
) -> None:
    """Run a coordinator and its devices on Flower's simulation engine, until both are done.

    Args:
        server_app: the coordinator; its exceptions leave this call.
        client_app: what every device runs; cloudpickle must be able to copy it.
        devices: how many; each finds `partition-id` and `num-partitions` in its node config.
        threads: CPU threads that one device takes.
        workers: devices that work at the same time.
        accelerators_per_device: share of a GPU that one device takes; default none.

    Raises:
        MissingExtraError: Ray is not installed.
        KeyboardInterrupt: on Ctrl-C, after the coordinator was interrupted as well.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", "the simulation backend 'ray'")
    # Imported here: it loads most of Flower, which only this backend needs.
    from flwr.simulation import run_simulation

    stop, done = threading.Event(), threading.Event()
    config = {
        "init_args": {
            "num_cpus": threads * workers,
            "logging_level": "ERROR",
            "log_to_driver": False,
            "include_dashboard": False,
        },
        "client_resources": {"num_cpus": threads, "num_gpus": accelerators_per_device},
    }
    with quiet_flower(logging.CRITICAL), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        try:
            run_simulation(
                server_app=_interruptible(server_app, stop, done),
                client_app=client_app,
                num_supernodes=devices,
                backend_config=config,
            )
        except KeyboardInterrupt:
            stop.set()
            done.wait(timeout=30)
            raise


def _interruptible(
    server_app: ServerApp, stop: threading.Event, done: threading.Event
) -> ServerApp:
    """The same coordinator, which sees a KeyboardInterrupt when `stop` is set.

    Flower runs it in a thread of its own, and Python interrupts only the main thread: without
    this it would wait on for replies, and the process would not end.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        try:
            server_app(grid=_InterruptibleGrid(grid, stop), context=context)
        except KeyboardInterrupt:
            if not stop.is_set():
                raise
        finally:
            done.set()

    return app


class _InterruptibleGrid(Grid):  # type: ignore[misc]  # flwr has no types that mypy follows here
    """Another grid, whose waits end with KeyboardInterrupt when `stop` is set."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._grid = grid
        self._stop = stop

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        self._check()
        return list(self._grid.get_node_ids())

    def get_nodes(self) -> list[NodeInfo]:
        self._check()
        return list(self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._check()
        return list(self._grid.push_messages(list(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self._check()
        replies = list(self._grid.pull_messages(list(message_ids)))
        self._check()
        for reply in replies:
            if reply.has_error():
                _shorten_reason(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            found = self.pull_messages(waiting)
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            if waiting:
                self._stop.wait(_POLL_S)
        return replies

    def _check(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt


def _shorten_reason(reply: Message) -> None:
    """Log a device's traceback, and leave one line of it in the reply.

    A device that refuses on purpose raises an error of fedtune's own; that is no news in a log.
    """
    reason = reply.error.reason or ""
    level = logging.INFO if "fedtune.errors." in reason else logging.ERROR
    _log.log(level, "device %d failed: %s", reply.metadata.src_node_id, reason)
    reply.error = Error(reply.error.code, readable_reason(reason))
