"""A fleet in this process: Flower's own Grid, without sockets, processes or Ray.

The same ServerApp and ClientApp that run over a network run here. A message is serialised to bytes
and back on each way, so that coordinator and device share no object; a device works on one message
at a time and keeps its `Context.state` from one to the next; and an exception of a device becomes
the error reply that Flower sends.

With one worker, devices take turns in the caller's own thread, in the order in which their
messages were pushed, while the caller waits in `pull_messages` or `send_and_receive`. So a run is
reproducible, and Ctrl-C stops the device at work at once.

Devices whose work is alike can do it in one pass over the base that they share: `together` says
which messages those are and answers them all. It is for one worker only, and not for messages that
a fault befalls.

A message's time to live counts from the moment at which its device starts on it, not from when it
was pushed: devices that take turns here would work at the same time in a fleet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, TypeAlias

from flwr.app import DEFAULT_TTL, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import FedtuneError
from fedtune.flwr_compat import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    NodeInfo,
    Run,
    become_coordinator,
    copy_over_wire,
    quiet_flower,
    set_message_id,
    set_source,
)

Fault: TypeAlias = "str | float | None"
"""What befalls a message: `"lost"` (no reply until its time to live is over), `"offline"` (an
error reply at once), a delay in seconds before the device starts, or None."""
FaultHook: TypeAlias = Callable[[int, Message], Fault]
"""Node id and message -> what befalls it; for tests."""


class Together(Protocol):
    """Answers the messages of several devices in one pass, each as its device alone would."""

    @property
    def most(self) -> int:
        """Devices in one pass."""
        ...

    def key(self, message: Message) -> Hashable:
        """Messages of equal keys may go together; None: this one goes alone."""
        ...

    def __call__(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> Sequence[Message | Exception]:
        """A reply, or what its device would have raised, for each message in turn."""
        ...


FIRST_NODE_ID = 1000
_RUN_ID = 1
_POLL_S = 0.05

_log = logging.getLogger(__name__)


class InProcessGrid(Grid):  # type: ignore[misc]  # flwr has no types that mypy follows here
    """Runs a ClientApp as many devices, in threads of this process.

    Args:
        client_app: what every device runs.
        devices: how many; device `i` has node id `1000 + i` and, like in Flower's simulation,
            the node config `{"partition-id": i, "num-partitions": devices}`.
        workers: devices that work at the same time.
        run_config: what every device finds in `Context.run_config`.
        fault: what befalls which message; default: nothing.
        together: lets devices work in one pass; default: they take turns.

    Attributes:
        bytes_down: size of all messages delivered to devices.
        bytes_up: size of all replies of devices.
    """

    def __init__(
        self,
        client_app: ClientApp,
        devices: int,
        *,
        workers: int = 1,
        run_config: Mapping[str, bool | int | float | str] | None = None,
        fault: FaultHook | None = None,
        together: Together | None = None,
    ) -> None:
        become_coordinator(_RUN_ID)
        self.bytes_down = 0
        self.bytes_up = 0
        self._app = client_app
        self._fault = fault
        self._together = together if workers == 1 and fault is None else None
        self._keys: dict[str, Hashable] = {}
        self._run = Run.create_empty(_RUN_ID)
        self._contexts = {
            FIRST_NODE_ID + i: Context(
                run_id=_RUN_ID,
                node_id=FIRST_NODE_ID + i,
                node_config={"partition-id": i, "num-partitions": devices},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for i in range(devices)
        }
        self._pushed = 0
        self._queue: deque[Message] = deque()
        self._busy: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._lost: dict[str, tuple[Message, float]] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"device-worker-{i}", daemon=True)
            for i in range(workers if workers > 1 else 0)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------ Flower's Grid

    def set_run(self, run: Run) -> None:
        """Set the run that the grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that the grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as `Message(...)` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ids of all devices, in order."""
        return list(self._contexts)

    def get_nodes(self) -> list[NodeInfo]:
        """All devices, in order."""
        return [
            NodeInfo(node_id=node, name=f"device-{i}", status="online")
            for i, node in enumerate(self._contexts)
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages for their devices, and give each its id.

        Raises:
            ValueError: a message goes to a node that does not exist.
        """
        ids = []
        with self._changed:
            for message in messages:
                node = message.metadata.dst_node_id
                if node not in self._contexts:
                    raise ValueError(f"no device has the node id {node}")
                self._pushed += 1
                set_message_id(message, f"message-{self._pushed}")
                ids.append(message.metadata.message_id)
                self._queue.append(message)
            self._changed.notify_all()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have arrived to the given messages; each is given out once.

        With one worker, the first of their devices that has not yet had its turn does its work
        inside this call.
        """
        asked = list(message_ids)
        if not self._threads:
            self._run_next(asked)
        with self._changed:
            self._expire_lost()
            return [self._replies.pop(i) for i in asked if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and wait for their replies, or for `timeout` seconds.

        A device that is at work when the time is over finishes its work; its reply can still be
        pulled. Messages on which no device has started are withdrawn.
        """
        waiting = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and not self._closed.is_set():
            if deadline is not None and time.monotonic() >= deadline:
                self._withdraw(waiting)
                break
            found = self.pull_messages(waiting)
            replies += found
            answered = {reply.metadata.reply_to_message_id for reply in found}
            waiting = [i for i in waiting if i not in answered]
            if waiting and not found:
                self._wait_for_change()
        return replies

    # ------------------------------------------------------------ closing

    def close(self, wait: bool = True) -> None:
        """Withdraw what is queued and stop the workers.

        Args:
            wait: until the devices at work have finished.
        """
        self._closed.set()
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()
        if wait:
            for thread in self._threads:
                thread.join()

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(wait=error is None)

    # ------------------------------------------------------------ the devices

    def _work(self) -> None:
        while not self._closed.is_set():
            if not self._run_next():
                self._wait_for_change()

    def _wait_for_change(self) -> None:
        with self._changed:
            self._changed.wait(_POLL_S)

    def _run_next(
        self, among: Iterable[str] | None = None, beside: Iterable[str] | None = None
    ) -> bool:
        """Let the first device that is idle and has a message do its work, if there is one.

        Those that can work together with it do theirs in the same pass.

        Args:
            among: ids of the messages that count; default: all.
            beside: ids of those that may go in its pass; default: the same.
        """
        with self._changed:
            asked = None if among is None else frozenset(among)
            first = self._take(asked)
            if first is None:
                return False
            alike = asked if beside is None else frozenset(beside)
            taken = [first, *self._take_alike(first, alike)]
        try:
            if len(taken) > 1:
                replies = self._deliver_together(taken)
            else:
                replies = [self._deliver(first.metadata.dst_node_id, first)]
        finally:
            with self._changed:
                self._busy -= {message.metadata.dst_node_id for message in taken}
        with self._changed:
            for message, reply in zip(taken, replies, strict=True):
                if reply is not None:
                    set_message_id(reply, f"reply-to-{message.metadata.message_id}")
                    self._replies[message.metadata.message_id] = reply
            self._changed.notify_all()
        return True

    def _take(self, among: frozenset[str] | None) -> Message | None:
        for position, message in enumerate(self._queue):
            node = message.metadata.dst_node_id
            if node not in self._busy and (among is None or message.metadata.message_id in among):
                del self._queue[position]
                self._busy.add(node)
                return message
        return None

    def _take_alike(self, first: Message, among: frozenset[str] | None) -> list[Message]:
        """Queued messages that can be answered in one pass with `first`."""
        together = self._together
        if together is None or (key := self._key(together, first)) is None:
            return []
        alike: list[Message] = []
        for message in list(self._queue):
            if len(alike) + 1 >= together.most:
                break
            node, message_id = message.metadata.dst_node_id, message.metadata.message_id
            if node in self._busy or (among is not None and message_id not in among):
                continue
            if self._key(together, message) == key:
                self._queue.remove(message)
                self._busy.add(node)
                alike.append(message)
        return alike

    def _key(self, together: Together, message: Message) -> Hashable:
        message_id = message.metadata.message_id
        if message_id not in self._keys:
            self._keys[message_id] = together.key(message)
        return self._keys[message_id]

    def _deliver_together(self, messages: Sequence[Message]) -> list[Message]:
        """Replies to messages that are answered in one pass, which may take all their time."""
        assert self._together is not None
        nodes = [message.metadata.dst_node_id for message in messages]
        end = time.monotonic() + sum(self._ttl(message) for message in messages)
        arrived = [self._arrive(message) for message in messages]
        found = self._together(arrived, [self._contexts[node] for node in nodes])
        if time.monotonic() >= end:
            return [_expired(message) for message in messages]
        return [
            _failure(node, message, reply)
            if isinstance(reply, Exception)
            else self._returned(reply)
            for node, message, reply in zip(nodes, messages, found, strict=True)
        ]

    def _deliver(self, node: int, message: Message) -> Message | None:
        """The reply to a message, or None while it is lost."""
        ttl = self._ttl(message)
        expires = time.monotonic() + ttl
        fault = self._fault(node, message) if self._fault is not None else None
        if fault == "lost":
            with self._changed:
                self._lost[message.metadata.message_id] = (message, expires)
            return None
        if fault == "offline":
            return _link_error(message, ErrorCode.NODE_UNAVAILABLE, "the node is offline")
        if isinstance(fault, (int, float)):
            self._closed.wait(min(fault, ttl))
        reply = self._call(node, message) if time.monotonic() < expires else None
        if reply is None or time.monotonic() >= expires:
            return _expired(message)
        return reply

    def _ttl(self, message: Message) -> float:
        """Seconds that a device may take from its start on a message."""
        return float(message.metadata.ttl or DEFAULT_TTL)

    def _call(self, node: int, message: Message) -> Message:
        """Run the ClientApp on one message; both ways go through bytes."""
        arrived = self._arrive(message)
        try:
            return self._returned(self._app(arrived, self._contexts[node]))
        except Exception as error:  # noqa: BLE001  # the edge of a device: Flower replies so too
            return _failure(node, message, error)

    def _arrive(self, message: Message) -> Message:
        """The message as its device gets it."""
        arrived, size = copy_over_wire(message)
        arrived.metadata.created_at = time.time()
        with self._changed:
            self.bytes_down += size
            self._keys.pop(message.metadata.message_id, None)
        return arrived

    def _returned(self, reply: Message) -> Message:
        """The reply as the coordinator gets it."""
        returned, size = copy_over_wire(reply)
        with self._changed:
            self.bytes_up += size
        return returned

    def _withdraw(self, message_ids: Iterable[str]) -> None:
        withdrawn = set(message_ids)
        with self._changed:
            self._queue = deque(m for m in self._queue if m.metadata.message_id not in withdrawn)

    def _expire_lost(self) -> None:
        now = time.monotonic()
        for message_id, (message, expires) in list(self._lost.items()):
            if now >= expires:
                del self._lost[message_id]
                self._replies[message_id] = _expired(message)


def _expired(message: Message) -> Message:
    reason = f"no reply within the {message.metadata.ttl:g} s of the message"
    return _link_error(message, ErrorCode.MESSAGE_UNAVAILABLE, reason)


def _link_error(message: Message, code: int, reason: str) -> Message:
    """An error reply that comes from the link, as Flower's does, and not from the node."""
    reply = Message(Error(code, reason), reply_to=message)
    set_source(reply, SUPERLINK_NODE_ID)
    return reply


def _failure(node: int, message: Message, error: Exception) -> Message:
    """The error reply of a device whose app raised; the cause goes to the log."""
    kind = message.metadata.message_type
    if isinstance(error, FedtuneError):
        _log.info("device %d refused %s: %s", node, kind, error)
    else:
        _log.error("device %d failed at %s", node, kind, exc_info=error)
    reason = f"{type(error)}:<'{error}'>"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def run_inprocess(
    server_app: ServerApp,
    client_app: ClientApp,
    devices: int,
    *,
    workers: int = 1,
    run_config: Mapping[str, bool | int | float | str] | None = None,
    fault: FaultHook | None = None,
    together: Together | None = None,
    make: Callable[..., InProcessGrid] = InProcessGrid,
) -> None:
    """Run a coordinator and its devices in this process, until the coordinator returns.

    Args:
        server_app: the coordinator; it runs in this thread, and its exceptions leave this call.
        client_app: what every device runs.
        devices: how many.
        workers: devices that work at the same time.
        run_config: what coordinator and devices find in `Context.run_config`.
        fault: what befalls which message, for tests; default: nothing.
        together: lets devices work in one pass; default: they take turns.
        make: makes the grid from all these; default: replies arrive as soon as they are there.
    """
    with (
        quiet_flower(),
        make(
            client_app,
            devices,
            workers=workers,
            run_config=run_config,
            fault=fault,
            together=together,
        ) as grid,
    ):
        context = Context(
            run_id=_RUN_ID,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(run_config or {}),
        )
        server_app(grid=grid, context=context)
