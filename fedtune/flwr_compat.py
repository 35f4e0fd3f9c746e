"""The only door to names that Flower does not promise to keep.

`flwr.app`, `flwr.serverapp`, `flwr.clientapp` and `flwr.simulation` are public. The rest of Flower
moves between releases, so each private name that the coordinator needs comes in here, with the
reason, and `tests/fedtune/test_flwr_compat.py` holds what is expected of it:

- `TaskIdentity`: `Message(...)` reads the run's id from this process-wide class and fails where
  nothing set it. Flower sets it in the processes it starts; the in-process grid is none of them.
- `message_to_proto`, `message_from_proto`: the serialisation that a message passes on a network,
  so that a simulated device never shares an object with the coordinator.
- `NodeInfo`: what `Grid.get_nodes` returns.
- `Run`: what `Grid.run` returns.
- `ErrorCode`: the codes that a coordinator sees in an error reply.
- `SUPERLINK_NODE_ID`: whom an error reply comes from when the link, and not the node, wrote it.
- `telemetry`: Flower reads its switch once, at its own first import, and reports by default.

A deployment needs more, which is imported where it is used, because it is heavy (SQL, FastAPI):

- `build_fab_from_files`: a run is started with a bundle; ours holds no code.
- `ControlHttpClient`: starts, stops and lists runs; lists nodes.
- `RuntimeHttpClient`, `HeartbeatSender` and the functions around a task (`pull_task_input`,
  `push_message`, `PushTaskOutput`): what Flower's own task processes do, without running the
  bundle's code.
- `HttpGrid`: the grid of a ServerApp; its client is given the operator's token.
- `create_app` of the link, its settings, `SQLITE_PRAGMAS`, `HEARTBEAT_PATIENCE` and the handler of
  `activate-node`: Flower's waits are too short for a loaded machine, and a node that was killed may
  not come back for a minute.
- The link's tables of messages and the handlers of `pull-messages` and `confirm-message-received`:
  what is lost on its way is not delivered again, and what is announced is delivered in parts.
- `flower_supernode` and what it makes its connection of: one HTTP 500 ends it, or its heartbeat;
  and its loop, which keeps the task of a message whose run ended while it was received.
- `now`: what Flower signs and compares; a site's clock may be wrong.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Final, Literal

import httpx
from flwr.app import Array, Context, Error, Message
from flwr.common.constant import (
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
)
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore import date, telemetry
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER as PUBLIC_KEY_HEADER
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER as SIGNATURE_HEADER
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.errors import AccessError, DeploymentError

__all__ = [
    "PUBLIC_KEY_HEADER",
    "SIGNATURE_HEADER",
    "SUPERLINK_NODE_ID",
    "TIMESTAMP_HEADER",
    "ClientTask",
    "Control",
    "ErrorCode",
    "FlowerNode",
    "FlowerRun",
    "LightNode",
    "LinkNodes",
    "NodeInfo",
    "Run",
    "ServerTask",
    "TaskSource",
    "become_coordinator",
    "copy_over_wire",
    "correct_clock",
    "expire_tasks_of_a_lost_executor",
    "forget_messages_of_ended_runs",
    "known_paths",
    "lean_transfers",
    "light_node",
    "link_app",
    "quiet_flower",
    "readable_reason",
    "run_fab",
    "run_node",
    "set_message_id",
    "set_source",
    "signing_fault",
    "watch_node_requests",
]


def become_coordinator(run_id: int) -> None:
    """Let this process create messages of a run, as the coordinator."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def copy_over_wire(message: Message) -> tuple[Message, int]:
    """The message as it is after its way over a network, and its size in bytes."""
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(MessageProto.FromString(data)), len(data)


def readable_reason(reason: str | None) -> str:
    """One line for a person out of the reason of an error reply.

    A network's reply says `<class 'ValueError'>:<'text'>`; one from Flower's simulation wraps that
    in a traceback with terminal colours, in which the text follows the last `Message:`.
    """
    text = _COLOURS.sub("", reason or "").strip()
    if _WRAPPED in text:
        text = text.rpartition(_WRAPPED)[2].strip().removesuffix("'>").removesuffix('">')
    elif match := _RAISED.fullmatch(text):
        name = match["name"].rpartition(".")[2]
        text = match["text"] if match["name"].startswith("fedtune.") else f"{name}: {match['text']}"
    lines = [line for line in text.splitlines() if line.strip()]
    return "".join(c for c in lines[0].strip() if c.isprintable()) if lines else ""


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"<class '(?P<name>[\w.]+)'>:<'(?P<text>.*)'>", re.DOTALL)
_WRAPPED = "Exception ClientAppException occurred. Message:"


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which in Flower only the link does."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source(message: Message, node_id: int) -> None:
    """Say which node a message comes from."""
    message.metadata.__dict__["_src_node_id"] = node_id


@contextmanager
def quiet_flower(level: int = logging.ERROR) -> Iterator[None]:
    """Keep Flower's log below `level` off the terminal, and its telemetry off the network.

    Telemetry stays on for a person who set FLWR_TELEMETRY_ENABLED to 1.
    """
    logger = logging.getLogger("flwr")
    level_before, telemetry_before = logger.level, telemetry.FLWR_TELEMETRY_ENABLED
    logger.setLevel(level)
    if os.environ.get("FLWR_TELEMETRY_ENABLED") is None:
        telemetry.FLWR_TELEMETRY_ENABLED = "0"
    try:
        yield
    finally:
        logger.setLevel(level_before)
        telemetry.FLWR_TELEMETRY_ENABLED = telemetry_before


# ---------------------------------------------------------------- runs and nodes, for an operator


@dataclass(frozen=True, slots=True)
class FlowerRun:
    """A run as Flower's link tells of it.

    Attributes:
        status: `pending`, `starting`, `running` or `finished`.
        sub_status: of a finished one: `completed`, `failed` or `stopped`.
        details: why it failed; may be empty.
        bytes_sent: by the coordinator, to all nodes.
    """

    status: str
    sub_status: str
    details: str
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True, slots=True)
class FlowerNode:
    """A node as Flower's link tells of it.

    Attributes:
        status: `registered`, `online`, `offline` or `unregistered`.
        public_key: PEM.
        last_activated_at: ISO 8601, UTC; empty: never.
        online_until: seconds since 1970 until which its last heartbeat counts.
        last_seen: seconds since 1970 of its last heartbeat; 0: never.
    """

    node_id: int
    name: str
    status: str
    public_key: bytes
    last_activated_at: str
    last_deactivated_at: str
    online_until: float
    last_seen: float


def run_fab(config: Mapping[str, str]) -> bytes:
    """The bundle that starts a run: a pyproject.toml alone, which names installed apps.

    Args:
        config: what Flower carries to the apps as their run configuration.
    """
    import tomli_w
    from flwr.cli.build import build_fab_from_files

    apps = {"serverapp": "fedtune_server.deployed:app", "clientapp": "fedtune_client.deployed:app"}
    app = {"publisher": "fedtune", "components": apps, "config": dict(config)}
    project = {"name": "fedtune-run", "version": "1.0.0", "license": "Apache-2.0"}
    tree = {"project": {**project, "dependencies": []}, "tool": {"flwr": {"app": app}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own use of pathspec
        content, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(tree).encode()})
    return bytes(content)


class _Bearer:
    """Shows a token with every request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


def _client(kind: Any, address: str, ca_pem: bytes | None, token: str, **options: Any) -> Any:
    """A client of the link or of a node; `ca_pem` None: plaintext on loopback."""
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor as Version

    interceptors = [Version(component_name=options.pop("component")), _Bearer(token)]
    if task_token := options.pop("task_token", ""):
        interceptors.append(RuntimeTokenHttpInterceptor(task_token))
    return kind.from_server_address(address, ca_pem is None, ca_pem, interceptors, **options)


class Control:
    """What an operator asks of Flower's link; every call fails at once where it is not there.

    Args:
        address: HOST:PORT of the link.
        ca_pem: the coordinator's CA; None: the link speaks plaintext.
        operator_token: see `HOME/operator.toml`.

    Raises (all methods):
        AccessError: the token is not the operator's.
        DeploymentError: the link cannot be reached, or refuses.
    """

    def __init__(self, address: str, ca_pem: bytes | str | None, operator_token: str) -> None:
        from flwr.supercore.control import ControlHttpClient

        ca = ca_pem.encode("ascii") if isinstance(ca_pem, str) else ca_pem
        self._address = address
        self._client = _client(ControlHttpClient, address, ca, operator_token, component="flwr CLI")

    def close(self) -> None:
        self._client.close()

    def start_run(self, fab: bytes) -> int:
        """Start a run of a bundle; returns its id."""
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        bundle = fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {}))
        run_id = self._ask("StartRun", StartRunRequest(fab=bundle, federation="")).run_id
        if not run_id:
            raise DeploymentError("Flower's link did not start the run; its log says why")
        return int(run_id)

    def stop_run(self, run_id: int) -> None:
        """Stop a run; one that has ended stays as it is."""
        from flwr.proto.control_pb2 import StopRunRequest

        if (run := self.runs().get(run_id)) is not None and run.status != "finished":
            self._ask("StopRun", StopRunRequest(run_id=run_id))

    def runs(self, most: int = 200) -> Mapping[int, FlowerRun]:
        """The newest runs, by id."""
        from flwr.proto.control_pb2 import ListRunsRequest

        found = self._ask("ListRuns", ListRunsRequest(limit=most)).run_dict.values()
        return {
            run.run_id: FlowerRun(
                run.status.status,
                run.status.sub_status,
                run.status.details,
                run.bytes_sent,
                run.bytes_recv,
            )
            for run in found
        }

    def nodes(self) -> list[FlowerNode]:
        """Every node that was not unregistered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        found = self._ask("ListNodes", ListNodesRequest()).nodes_info
        return [
            FlowerNode(
                node.node_id,
                node.name,
                node.status,
                node.public_key,
                node.last_activated_at,
                node.last_deactivated_at,
                node.online_until,
                max(0.0, node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval),
            )
            for node in found
            if node.status != "unregistered"
        ]

    def register_node(self, public_key: bytes | str, name: str = "") -> int:
        """Let a key's node connect; returns its id. Registering it again returns the same."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        key = public_key.encode("ascii") if isinstance(public_key, str) else public_key
        for node in self.nodes():
            if node.public_key == key:
                return node.node_id
        request = RegisterNodeRequest(public_key=key, name=name or None)
        return int(self._ask("RegisterNode", request).node_id)

    def unregister_node(self, node_id: int) -> None:
        """Let a node connect no longer; one that is unknown stays unknown."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        if any(node.node_id == node_id for node in self.nodes()):
            self._ask("UnregisterNode", UnregisterNodeRequest(node_id=node_id))

    def _ask(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._client, method)(request)
        except httpx.HTTPStatusError as error:
            raise _refused(error, self._address) from None
        except httpx.HTTPError as error:
            raise DeploymentError(
                f"Flower's link at {self._address} cannot be reached "
                f"({type(error).__name__}: {error}); is the coordinator running?"
            ) from None


HEARTBEAT_PATIENCE: Final = 2
"""Heartbeats that a node may miss (flwr.common.constant.HEARTBEAT_PATIENCE)."""


def _refused(error: httpx.HTTPStatusError, address: str) -> DeploymentError:
    words = readable_reason(error.response.text)[:500]
    if error.response.status_code in (401, 403):
        return AccessError(f"Flower's link at {address} refuses: {words}")
    return DeploymentError(f"Flower's link at {address}: {error.response.status_code}: {words}")


# ---------------------------------------------------------------- retries, clocks, signatures


def patient_retries() -> Any:
    """Flower's own retries, which also outlive what a restart or a loaded disk causes.

    Beside 502 to 504, 500 (`database is locked`) and 429 (asked too often) pass by. Flower gives
    up on every error of TLS, which a link that is being started shows, too; and ends the process
    with SIGINT on 401, where we let the caller see it.
    """
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.retry.retry_invoker import exponential

    invoker = make_simple_http_retry_invoker()
    invoker.wait_gen_factory = lambda: exponential(max_delay=LONGEST_RETRY_S)
    flowers_choice = invoker.should_giveup

    def should_give_up(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError):
            return False
        if isinstance(error, httpx.HTTPStatusError):
            status = error.response.status_code
            if status in (429, 500):
                return False
            if status == httpx.codes.UNAUTHORIZED:
                return True
        return bool(flowers_choice(error))

    invoker.should_giveup = should_give_up
    return invoker


LONGEST_RETRY_S: Final = 6
"""Between two attempts at a link that is away, at random up to this; Flower's 20 s make a round
wait twice as long as its link was away."""


class _Absence:
    """Seconds in which calls waited for a link that was away; those of several at once count once.

    Args:
        invoker: whose attempts are watched.
    """

    def __init__(self, invoker: Any) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._seconds = 0.0
        self._done = invoker.on_success
        invoker.on_success = self._succeeded

    def seconds(self) -> float:
        """In all until now, less those of a call that waits."""
        with self._lock:
            return self._seconds

    def _succeeded(self, state: Any) -> None:
        if self._done is not None:
            self._done(state)
        if state.tries > 1:
            now = time.monotonic()
            with self._lock:
                self._seconds += now - max(self._until, now - state.elapsed_time)
                self._until = now


def absence(grid: Any) -> Callable[[], float]:
    """Tells how long a grid's link was away in all, in seconds; of a `ServerTask`'s, or 0."""
    found = getattr(grid, "_fedtune_absence", None)
    return found.seconds if found is not None else lambda: 0.0


_now = date.now


def correct_clock(offset_s: Callable[[], float]) -> None:
    """Let Flower's idea of the time in this process be the coordinator's.

    Args:
        offset_s: seconds that the coordinator's clock is ahead of this machine's; asked each time.
    """

    def now() -> datetime.datetime:
        moment: datetime.datetime = _now()
        return moment + datetime.timedelta(seconds=offset_s())

    before = date.now
    date.now = now
    for name, module in list(sys.modules.items()):
        if name.startswith("flwr.") and getattr(module, "now", None) is before:
            module.now = now  # type: ignore[attr-defined]


def signing_fault(public_key: bytes, signature: bytes, timestamp: str) -> str:
    """Why a node's signed request is not good, in words for the site; empty: it is good."""
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    try:
        signed_at = datetime.datetime.fromisoformat(timestamp)
        age_s = (date.now() - signed_at).total_seconds()
        good = verify_signature(
            bytes_to_public_key(public_key), timestamp.encode("ascii"), signature
        )
    except (ValueError, TypeError, AttributeError):
        return "the request's signature is malformed"
    if not good:
        return "the request is not signed by the site's key"
    if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        return f"the request was signed {age_s:.0f} s ago by the coordinator's clock"
    return ""


# ---------------------------------------------------------------- the coordinator's link


def link_app(arguments: Sequence[str], on_activate: Callable[[bytes], None]) -> Any:
    """Flower's link as an ASGI app, patient and without a server around it.

    A node that comes back while its last process still counts as online takes its place at once:
    its signature shows who it is. Flower itself refuses it for up to a minute.

    Args:
        arguments: of the command `flower-superlink`.
        on_activate: called before a node is activated, with its public key.
    """
    from flwr.supercore import constant, sql_mixin
    from flwr.supercore.corestate import sql_corestate
    from flwr.superlink import main
    from flwr.superlink.servicer.fleet import fleet_handlers

    # The package holds a function of the same name, which hides the module.
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")
    ours = {"busy_timeout": str(1000 * BUSY_S), "cache_size": str(-CACHE_KIB)}
    sql_mixin.SQLITE_PRAGMAS = tuple((dict(constant.SQLITE_PRAGMAS) | ours).items())
    sql_corestate.HEARTBEAT_PATIENCE = TASK_PATIENCE
    _look_for_lost_tasks_once_a_second(sql_corestate.SqlCoreState)
    _keep_connections(sql_mixin)
    _deliver_until_confirmed()
    _take_what_is_there_as_stored(sql_corestate.SqlCoreState)
    layers = _only_where_they_act(main._get_middleware())
    main._get_middleware = lambda: layers
    activate = fleet_handlers.activate_node

    def activate_node(request: Any, state: Any) -> Any:
        on_activate(request.public_key)
        return activate(request=request, state=state)

    fleet_handlers.activate_node = activate_node
    before, sys.argv = sys.argv, ["flower-superlink", *arguments]
    try:
        config = command._parse_superlink_lifespan_config()
    finally:
        sys.argv = before
    return main.create_app(config, command.SuperLinkLifespan)


BUSY_S: Final = 120
"""How long a query waits for SQLite's lock. Flower's 5 s fail runs of a few hundred objects."""
CACHE_KIB: Final = 2 * 1024
"""Of SQLite, for each connection: its default. Flower's 64 MB add up, with a connection a thread;
what is read of the database comes through a map of the file anyhow."""
CONNECTIONS: Final = 40
"""To SQLite: as many as the link has threads. Flower opens anew what goes beyond five."""
TASK_PATIENCE: Final = 5
"""Heartbeats of 30 s that a ServerApp may miss: the link may be away for two minutes."""


_LAYERS: Final = {
    "ControlSensitiveResponseMiddleware": "/v1/control/",
    "ControlAuthenticationMiddleware": "/v1/control/",
    "ControlLicenseMiddleware": "/v1/control/",
    "NodeAuthMiddleware": "/v1/fleet/",
}
"""Layers of Flower's link that pass on unchanged whatever is not below a path."""
_UNUSED: Final = frozenset(
    {"ControlEventLogMiddleware", "FleetEventLogMiddleware", "RuntimeTracingMiddleware"}
)
"""Layers that only serve plugins of Flower's enterprise edition."""


def _only_where_they_act(layers: Sequence[Any]) -> list[Any]:
    """Layers around the link's app, each left out of requests that do not concern it.

    A layer that does nothing still costs 0.3 ms of processor: it copies the request and the answer
    through a queue and a task of its own. Nine of them took half of the link's time.
    """

    def narrow(layer: Any) -> Any:
        kind = layer.cls
        prefix = _LAYERS.get(kind.__name__)
        if prefix is None:
            return layer

        class Narrow(kind):  # type: ignore[misc, valid-type]
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] == "http" and not scope["path"].startswith(prefix):
                    await self.app(scope, receive, send)
                else:
                    await super().__call__(scope, receive, send)

        return type(layer)(Narrow, *layer.args, **layer.kwargs)

    return [narrow(layer) for layer in layers if layer.cls.__name__ not in _UNUSED]


def _look_for_lost_tasks_once_a_second(state: Any) -> None:
    """Let a link look for tasks without heartbeats once a second, not at every request.

    The look writes to the database, and so it waits for whoever else writes; a task has minutes.
    """
    look = state._cleanup_expired_task_tokens
    last = 0.0

    def look_sometimes(self: Any) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= 1.0:
            last = now
            look(self)

    state._cleanup_expired_task_tokens = look_sometimes


def _keep_connections(sql: Any) -> None:
    """Let a link keep its connections to a database in a file, instead of making them anew."""
    create = sql.create_engine

    def create_engine(url: str, **options: Any) -> Any:
        if "poolclass" not in options:
            options |= {"pool_size": CONNECTIONS, "max_overflow": CONNECTIONS}
        return create(url, **options)

    sql.create_engine = create_engine


def _deliver_until_confirmed() -> None:
    """Let a link deliver messages that are whole, and again to who asks before having confirmed.

    Flower counts a message as delivered, and takes a reply out of its tables, before the answer
    that carries it has left. Where that answer is lost, since the link was killed or the connection
    broke, the message is lost, too, and the other side waits for it until its time is over. A node
    asks for its next message once it is done with the last one, and a coordinator for the replies
    that it lacks: who asks again has not got it.

    Flower delivers a message as soon as it is announced. Whoever takes it then asks for its parts
    again and again while they are still pushed, which slows those who push, and takes no other
    message meanwhile.
    """
    from flwr.server.superlink.linkstate import sql_linkstate
    from flwr.superlink.servicer.runtime import runtime_handlers

    _claim_lost_instructions_again(sql_linkstate)
    pull, confirm = runtime_handlers.pull_messages, runtime_handlers.confirm_message_received
    result = sql_linkstate.MessageResModel

    def pull_messages(request: Any, state: Any, task: Any) -> Any:
        asked = result.reply_to_message_id.in_(list(request.message_ids))
        with state.session() as session:
            again = session.scalars(
                sql_linkstate.select(result.message_id).where(asked, result.delivered_at != "")
            ).all()
            _give_back(session, sql_linkstate, result, again)
        keeping = _Keeping(state)
        answer = pull(request, keeping, task)
        there = {each.metadata.reply_to_message_id for each in answer.messages_list}
        with state.session() as session:
            kept = session.scalars(
                sql_linkstate.select(result.reply_to_message_id).where(
                    result.reply_to_message_id.in_(there & keeping.to_delete)
                )
            ).all()
        state.delete_messages(keeping.to_delete - set(kept))
        return _whole(answer, state, sql_linkstate)

    def confirm_message_received(request: Any, state: Any, task: Any) -> Any:
        answer = confirm(request, state, task)
        with state.session() as session:
            done = session.scalars(
                sql_linkstate.select(result.reply_to_message_id).where(
                    result.message_id == request.message_object_id
                )
            ).all()
        state.delete_messages(set(done))
        return answer

    runtime_handlers.pull_messages = pull_messages
    runtime_handlers.confirm_message_received = confirm_message_received


def _whole(answer: Any, state: Any, sql: Any) -> Any:
    """The answer without replies whose parts are not all there; they may be asked for again."""
    replies = [message.metadata.message_id for message in answer.messages_list]
    with state.session() as session:
        if not (missing := _not_whole(session, sql, replies)):
            return answer
        _give_back(session, sql, sql.MessageResModel, missing)
    pairs = zip(answer.messages_list, answer.message_object_trees, strict=True)
    kept = [(message, tree) for message, tree in pairs if tree.object_id not in missing]
    return type(answer)(
        messages_list=[message for message, _ in kept],
        message_object_trees=[tree for _, tree in kept],
    )


def _give_back(session: Any, sql: Any, table: Any, messages: Collection[str]) -> None:
    """Let messages of a table count as not delivered."""
    if messages:
        lost = table.message_id.in_(messages)
        session.execute(sql.update(table).where(lost).values(delivered_at=""))


def _not_whole(session: Any, sql: Any, messages: Sequence[str]) -> set[str]:
    """Those of which parts are still to come: the part that holds the others is pushed last."""
    from flwr.supercore.state.schema.objectstore_models import StoredObject

    if not messages:
        return set()
    return set(
        session.scalars(
            sql.select(StoredObject.object_id).where(
                StoredObject.object_id.in_(messages), StoredObject.is_available == 0
            )
        )
    )


class _Keeping:
    """A link's state that only notes which messages it is told to delete."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.to_delete: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        self.to_delete |= message_ins_ids


def _claim_lost_instructions_again(sql: Any) -> None:
    """Let a node have an instruction again whose parts it has not confirmed, and asks for more.

    One that was sent before the node came back is left: the coordinator asks such a node anew.
    """
    from flwr.supercore.state.schema.objectstore_models import StoredObject

    ins, node = sql.MessageInsModel, sql.NodeModel
    claim = sql.SqlLinkState._claim_message_ins_rows
    tries: dict[str, int] = {}
    nothing_open: set[int] = set()

    def give_lost_ones_back(self: Any, node_id: int) -> None:
        with self.session() as session:
            found = session.execute(
                sql.select(ins.message_id, ins.delivered_at)
                .join(node, node.node_id == ins.dst_node_id)
                .join(StoredObject, StoredObject.object_id == ins.message_id)
                .where(
                    ins.dst_node_id == sql.uint64_to_int64(node_id),
                    ins.delivered_at != "",
                    ins.delivered_at > node.last_activated_at,
                )
            ).all()
            lost = [message for message, at in found if _is_time(tries, message, at)]
            _give_back(session, sql, ins, lost)
        if not found:
            nothing_open.add(node_id)

    def _claim_message_ins_rows(self: Any, node_id: int, *args: Any, **kwargs: Any) -> Any:
        if node_id not in nothing_open:  # as after the link's start
            give_lost_ones_back(self, node_id)
        claimed = claim(self, node_id, *args, **kwargs)
        if not claimed:
            return claimed
        nothing_open.discard(node_id)
        with self.session() as session:
            missing = _not_whole(session, sql, [row["message_id"] for row in claimed])
            _give_back(session, sql, ins, missing)
        return [row for row in claimed if row["message_id"] not in missing]

    sql.SqlLinkState._claim_message_ins_rows = _claim_message_ins_rows


def _take_what_is_there_as_stored(state: Any) -> None:
    """Let a link say of a part that is pushed again that it has it.

    Flower says no, and whoever pushes the part, since the answer to its first push was lost, ends.
    """
    store = state.store_object

    def store_object(self: Any, run_id: int, session: str, name: str, content: bytes) -> bool:
        stored = store(self, run_id, session, name, content)
        return bool(stored or (content and self.object_store.get(name) == content))

    state.store_object = store_object


LONGEST_PAUSE_S: Final = 60.0
"""Between two deliveries of a message to a node that fails to take it, such as with a full disk."""


def _is_time(tries: dict[str, int], message: str, delivered_at: str) -> bool:
    """Whether a message may be delivered once more; the pauses double."""
    since = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(delivered_at)
    count = tries.get(message, 0)
    if since.total_seconds() < min(2.0**count - 1, LONGEST_PAUSE_S):
        return False
    if len(tries) >= _MOST_TRIES_KEPT:
        tries.clear()
    tries[message] = count + 1
    return True


_MOST_TRIES_KEPT: Final = 10_000


class LinkNodes:
    """The nodes that a link's database knows, for the process of the link itself."""

    def __init__(self, app: Any) -> None:
        app.state.enable_supernode_auth = True  # also where a proxy in front ends TLS
        self._state = app.state.linkstate_factory.state

    def register(self, public_key: bytes) -> int:
        """Let a key's node connect; returns its id. One that is known stays as it is."""
        from flwr.common.constant import (
            HEARTBEAT_DEFAULT_INTERVAL,
            NOOP_ACCOUNT_NAME,
            NOOP_FLWR_AID,
        )

        state = self._state()
        node_id = state.get_node_id_by_public_key(public_key)
        if node_id is None:
            node_id = state.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, HEARTBEAT_DEFAULT_INTERVAL
            )
        return int(node_id)

    def make_ready(self, public_key: bytes) -> int:
        """Have a key's node known and not online, so that it can be activated; returns its id."""
        node_id = self.register(public_key)
        self._state().deactivate_node(node_id)
        return node_id

    def forget(self, node_id: int) -> None:
        """Let a node connect no longer."""
        from flwr.common.constant import NOOP_FLWR_AID

        with suppress(ValueError):  # unknown
            self._state().delete_node(NOOP_FLWR_AID, node_id)


def known_paths(prefix: str) -> frozenset[str]:
    """The exact paths that the link answers below a prefix."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    return frozenset(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith(prefix))


# ---------------------------------------------------------------- a site's node


def watch_node_requests(around: Callable[[httpx.Request, Callable[[], Any]], Any]) -> None:
    """Let a function stand around every request of this process's node, after it was signed."""
    from flwr.supernode import fleet_http_connection

    signer = fleet_http_connection.NodeAuthHttpInterceptor

    class Watched(signer):  # type: ignore[misc, valid-type]
        def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
            def signed(inner: Any) -> Any:
                return around(inner.request, lambda: call_next(inner))

            return super().intercept(context, signed)

    fleet_http_connection.NodeAuthHttpInterceptor = Watched


def expire_tasks_of_a_lost_executor(half_a_reply: Callable[[], object] = lambda: None) -> None:
    """Answer for a task whose executor died as soon as another executor asks for work.

    A site has one executor, which asks for a task only when it has none: what is still under way
    then is lost. Flower finds that out after 60 s.

    Args:
        half_a_reply: called if it died while it handed its reply over. Flower's node waits for the
            rest without end, in its only loop, and counts as online.
    """
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.object_store import NoObjectInStoreError
    from flwr.supernode.servicer.runtime import runtime_handlers

    acquire = runtime_handlers.acquire_task
    long_ago = datetime.datetime.fromtimestamp(0, datetime.UTC)

    def is_half(state: Any, message_id: str) -> bool:
        store = state.object_store
        try:
            parts = iterate_object_tree(store.get_object_tree(message_id))
            return any(store.get(part.object_id) == b"" for part in parts)
        except NoObjectInStoreError:  # sent, and deleted meanwhile
            return False

    def acquire_task(request: Any, state: Any) -> Any:
        with state.lock_msg_store:
            messages = [entry.message.metadata for entry in state.msg_store.values()]
        replies = [each.message_id for each in messages if each.reply_to_message_id]
        if any(is_half(state, reply) for reply in replies):
            half_a_reply()
        with state.lock_task_store:
            for record in state.task_token_store.values():
                record.active_until = long_ago
            state._cleanup_expired_task_tokens_locked()
        return acquire(request, state)

    runtime_handlers.acquire_task = acquire_task


def forget_messages_of_ended_runs() -> None:
    """Let a node drop a message whose run ends while it comes.

    Flower raises a `BaseException` then, which passes by the node's own cleaning: the message stays
    with a task that waits for the missing parts for ever, and nothing else is done.
    """
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal

    pull = start_client_internal.pull_objects

    def pull_objects(*args: Any, **kwargs: Any) -> Any:
        try:
            return pull(*args, **kwargs)
        except RunNotRunningException:
            raise RuntimeError("its run has ended while it came") from None

    start_client_internal.pull_objects = pull_objects


def guard_node_app(wrap: Callable[[Any], Any]) -> None:
    """Let a function wrap the app that a node serves to its executor."""
    from flwr.supernode import main

    create = main.create_app
    main.create_app = lambda *args, **kwargs: wrap(create(*args, **kwargs))


class _PacedTime:
    """Stands for the module `time` in the node's loop, which sleeps 3 s where no message waits."""

    def __init__(self, poll_s: Callable[[], float]) -> None:
        self._poll_s = poll_s

    def sleep(self, seconds: float) -> None:
        time.sleep(self._poll_s() if seconds == POLL_S else min(seconds, REPLY_POLL_S))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


POLL_S: Final = 3
"""How long Flower's node waits before it asks its link again."""
REPLY_POLL_S: Final = 0.1
"""How long a node waits before it looks again for its executor's reply, in its own memory."""


def run_node(
    arguments: Sequence[str],
    *,
    plaintext: bool = False,
    poll_s: Callable[[], float] = lambda: POLL_S,
) -> None:
    """Run Flower's node in this thread, until it ends; it survives failing requests.

    Args:
        arguments: of the command `flower-supernode`.
        plaintext: sign requests but do not encrypt them, which Flower does not offer.
        poll_s: seconds to wait before the link is asked for a message again.
    """
    import uvicorn
    from flwr.supercore.exit import exit as flower_exit
    from flwr.supernode import fleet_http_connection

    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    # uvicorn would give its loggers handlers of its own, which write text past the log.
    config = partial(uvicorn.Config, log_config=None)
    command.uvicorn = SimpleNamespace(  # type: ignore[attr-defined]
        Server=uvicorn.Server, Config=config
    )
    loop: Any = importlib.import_module("flwr.supernode.start_client_internal")
    loop.time = _PacedTime(poll_s)
    flower_exit.FORCE_EXIT_TIMEOUT_SECONDS = FORCED_END_S
    fleet_http_connection.make_simple_http_retry_invoker = patient_retries
    sender = fleet_http_connection.HeartbeatSender

    class PatientSender(sender):  # type: ignore[misc, valid-type]
        def __init__(self, beat: Callable[[], bool]) -> None:
            def patient_beat() -> bool:
                try:
                    return beat()
                except (httpx.HTTPError, RuntimeError) as error:
                    logging.getLogger("fedtune").warning("heartbeat failed: %s", error)
                    return False

            super().__init__(patient_beat)

    fleet_http_connection.HeartbeatSender = PatientSender
    if plaintext:
        fleet_client = fleet_http_connection.FleetHttpClient
        open_client = fleet_client.from_server_address

        def open_plain(address: str, _insecure: bool, _ca: object, interceptors: Any) -> Any:
            return open_client(address, True, None, interceptors)

        fleet_client.from_server_address = open_plain
    before, sys.argv = sys.argv, ["flower-supernode", *arguments]
    try:
        command.flower_supernode()
    finally:
        sys.argv = before


FORCED_END_S: Final = 3
"""How long Flower's own handlers may take after SIGTERM before the process ends."""


class LightNode:
    """What a node asks of its link, without a process of its own: for load, not for sites."""

    def __init__(self, connection: Any) -> None:
        _, self._receive, self._send, self._run, self._fab, *objects = connection
        self._pull, self._push, self._confirm = objects
        self._known: set[int] = set()

    def receive(self) -> Message | None:
        """The next message, if one waits, by the requests with which Flower's node fetches it.

        Raises:
            httpx.HTTPError: the link is not there, or refuses.
        """
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        if (found := self._receive()) is None:
            return None
        message, tree = found
        run_id = message.metadata.run_id
        if run_id not in self._known:
            self._fab(self._run(run_id).fab_hash, run_id)
            self._known.add(run_id)
        whole: Message = pull_and_inflate_object_from_tree(
            tree,
            lambda name: self._pull(run_id, name),
            lambda name: self._confirm(run_id, name),
            return_type=Message,
        )
        set_message_id(whole, tree.object_id)
        return whole

    def reply(self, message: Message) -> None:
        """Send a reply to a message.

        Raises:
            httpx.HTTPError: the link is not there, or refuses.
        """
        from flwr.supercore.inflatable import inflatable_object
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        run_id = message.metadata.run_id
        set_message_id(message, message.object_id)
        with inflatable_object.no_object_id_recompute():
            tree = inflatable_object.get_object_tree(message)
            objects = inflatable_object.get_all_nested_objects(message)
            wanted, session = self._send(message, tree, 0.0)
            push_objects(
                objects,
                lambda name, content: self._push(run_id, session, name, content),
                object_ids_to_push=wanted,
            )


@contextmanager
def light_node(server: str, ca_certificate: str, key: Any) -> Iterator[LightNode]:
    """Connect a node to a link, and keep it alive by heartbeats until the end.

    Args:
        server: HOST:PORT of the link.
        ca_certificate: path of the coordinator's CA.
        key: the private key, as `cryptography` holds it.
    """
    from flwr.supernode import fleet_http_connection

    fleet_http_connection.make_simple_http_retry_invoker = patient_retries
    keys = (key, key.public_key())
    with fleet_http_connection.http_request_response(
        server, False, ca_certificate, authentication_keys=keys
    ) as connection:
        yield LightNode(connection)


# ---------------------------------------------------------------- tasks: apps without bundles


class TaskSource:
    """Where tasks come from: a link's ServerApps, or a node's ClientApps.

    Args:
        ca_pem: the coordinator's CA; None: plaintext, which is for a node on loopback.
        token: the operator's at a link, the executor's secret at a node.
    """

    def __init__(
        self, kind: Literal["server", "client"], address: str, ca_pem: bytes | None, token: str
    ) -> None:
        from flwr.supercore.constant import TaskType
        from flwr.supercore.runtime import RuntimeHttpClient

        self._type = TaskType.SERVER_APP if kind == "server" else TaskType.CLIENT_APP
        self._make: Callable[[str], Any] = lambda task_token: _client(
            RuntimeHttpClient, address, ca_pem, token, component="SuperExec", task_token=task_token
        )
        self._client = self._make("")

    def acquire(self) -> tuple[str, int] | None:
        """Take the oldest waiting task: its token and its run; None: there is none.

        Raises:
            httpx.HTTPError: the link or node is not there, or refuses.
        """
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._type]))
        if not (found.HasField("task") and found.token):
            return None
        return str(found.token), int(found.task.run_id)

    def fail(self, task_token: str, details: str) -> None:
        """Say that the process of a task has died; nothing happens if the task had ended.

        Raises:
            httpx.HTTPError: the link is not there.
        """
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        client = self._make(task_token)
        try:
            request = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details)
            client.PushTaskOutput(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in (401, 403):
                raise
        finally:
            client.close()

    def close(self) -> None:
        self._client.close()


class _Heartbeat:
    """Keeps a task alive; calls `gone` once, from a thread, when its link or node forgot it."""

    def __init__(self, client: Any, gone: Callable[[], None]) -> None:
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
        from flwr.supercore.heartbeat import HeartbeatSender

        self._told = threading.Event()

        def beat() -> bool:
            if self._told.is_set():
                return True
            try:
                alive = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (401, 403, 404):
                    return False
                alive = False
            except httpx.TransportError:
                return False
            if not alive and not self._told.is_set():
                self._told.set()
                gone()
            return True

        self._sender = HeartbeatSender(beat)
        self._sender.start()

    def stop(self) -> None:
        if self._sender.is_running:
            self._sender.stop()


def lean_transfers() -> None:
    """Let this process hold an array that it sends or takes twice, and no further times.

    Flower deflates all objects of all messages before it sends the first, and puts an array that
    came together in a buffer that it then copies.
    """
    from flwr.supercore.inflatable import inflatable_utils

    inflatable_utils.push_object_contents_from_iterable = _push_few_at_a_time
    Array.inflate = classmethod(_inflate_array)


def _push_few_at_a_time(
    object_contents: Iterable[tuple[str, bytes]],
    push_object_fn: Callable[[str, bytes], None],
    *,
    max_concurrent_pushes: int = 2,
) -> None:
    """Push objects, of which as many exist in bytes as are under way."""
    with ThreadPoolExecutor(max_concurrent_pushes) as executor:
        under_way: set[Future[None]] = set()
        for name, content in object_contents:
            under_way.add(executor.submit(push_object_fn, name, content))
            del content
            if len(under_way) >= max_concurrent_pushes:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
        for each in under_way:
            each.result()


_inflate = Array.inflate


def _inflate_array(
    cls: type[Array], object_content: bytes, children: Mapping[str, Any] | None = None
) -> Array:
    """What `Array.inflate` makes, from its pieces in one step."""
    from flwr.supercore.inflatable import inflatable_object

    pieces = dict(children or {})
    empty = {name: type(piece)(memoryview(b"")) for name, piece in pieces.items()}
    array = _inflate(object_content, empty)
    names = inflatable_object.get_object_children_ids_from_object_content(object_content)
    order = json.loads(inflatable_object.get_object_body(object_content, cls))["arraychunk_ids"]
    array.data = b"".join(pieces[names[place]].data for place in order)
    return array


class ClientTask:
    """One message for a ClientApp, taken from a node.

    Args:
        address: HOST:PORT of the node, on loopback.
        gone: called from a thread when the node has forgotten the task.
    """

    def __init__(self, address: str, token: str, task_token: str, gone: Callable[[], None]) -> None:
        from flwr.supercore.runtime import RuntimeHttpClient

        def client(**options: Any) -> Any:
            options |= {"component": "flwr-clientapp", "task_token": task_token}
            return _client(RuntimeHttpClient, address, None, token, **options)

        lean_transfers()
        self._client = client(retry_invoker=_bounded_retries())
        self._beats = client()
        self._heartbeat = _Heartbeat(self._beats, gone)
        self._context: Context | None = None

    def receive(self) -> tuple[Message, Context]:
        """The message; the bundle that comes with it is not looked at.

        Raises:
            RuntimeError: the node does not get all of the message.
            httpx.HTTPError: the node is not there, or has forgotten the task.
        """
        from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        try:
            message, self._context, _run, _fab = pull_task_input(self._client)
        except ObjectPullError as error:  # the node could not get all of it
            raise RuntimeError(str(error)) from error
        return message, self._context

    def reply(self, message: Message) -> None:
        """Hand the reply over, and end the task."""
        from flwr.common.constant import SubStatus
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        failed = message.has_error()
        details = readable_reason(message.error.reason) if failed else ""
        push_message(self._client, message, self._context)
        status = SubStatus.FAILED if failed else SubStatus.COMPLETED
        push_task_output(self._client, self._context, status, details)

    def close(self) -> None:
        self._heartbeat.stop()
        self._client.close()
        self._beats.close()


def _bounded_retries() -> Any:
    """For a node on the same machine: one that is away this long has lost the task anyhow."""
    invoker = patient_retries()
    invoker.max_time = 60.0
    return invoker


def error_reply(message: Message, error: BaseException) -> Message:
    """The reply that says what an app raised, in the form that Flower's own processes write."""
    text = f"{type(error)}:<'{error}'>"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text), reply_to=message)


class ServerTask:
    """One run of a ServerApp, taken from the link.

    Args:
        address: HOST:PORT of the link.
        token: the operator's.
        gone: called from a thread when the link has forgotten the task, as after a stop.
    """

    def __init__(
        self,
        address: str,
        ca_pem: bytes | None,
        token: str,
        task_token: str,
        gone: Callable[[], None],
    ) -> None:
        from flwr.supercore.runtime import RuntimeHttpClient
        from flwr.superlink.grid import HttpGrid

        def client(**options: Any) -> Any:
            options |= {"component": "flwr-serverapp", "task_token": task_token}
            return _client(RuntimeHttpClient, address, ca_pem, token, **options)

        lean_transfers()
        self._retries = patient_retries()
        self.grid = HttpGrid(address, ca_pem is None, ca_pem, token=task_token)
        self.grid._retry_invoker = self._retries
        self.grid._fedtune_absence = _Absence(self._retries)
        self.grid._client = client(retry_invoker=self._retries)
        self._beats = client()
        self._heartbeat = _Heartbeat(self._beats, gone)

    def receive(self) -> Context:
        """The run's context, with its configuration; the bundle's code is not looked at."""
        from flwr.common.config import get_fused_config_from_fab
        from flwr.common.serde import context_from_proto, fab_from_proto, run_from_proto
        from flwr.proto.runtime_pb2 import PullTaskInputRequest

        found = self.grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        run, context = run_from_proto(found.run), context_from_proto(found.context)
        TaskIdentity.task_id = found.task_id
        TaskIdentity.run_id = run.run_id
        TaskIdentity.node_id = context.node_id
        self.grid.set_run(run)
        context.run_config = get_fused_config_from_fab(fab_from_proto(found.fab).content, run)
        return context

    def end(self, failure: str) -> None:
        """Say how it ended; empty: well. Tried once, because it is done while being ended, too.

        Raises:
            httpx.HTTPError: the link is not there, or has forgotten the task.
        """
        from flwr.common.constant import SubStatus
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        status = SubStatus.FAILED if failure else SubStatus.COMPLETED
        request = PushTaskOutputRequest(sub_status=status, details=failure)
        self._beats.PushTaskOutput(request)

    def close(self) -> None:
        self._heartbeat.stop()
        self.grid.close()
        self._beats.close()
