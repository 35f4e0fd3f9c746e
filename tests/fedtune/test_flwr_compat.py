"""What we expect of Flower's private names; fails when a release moves them."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import io
import itertools
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore import telemetry
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import RunNotRunningException
from starlette.middleware import Middleware

import fedtune
from fedtune import flwr_compat
from fedtune.flwr_compat import (
    HEARTBEAT_PATIENCE,
    SUPERLINK_NODE_ID,
    ClientTask,
    ErrorCode,
    NodeInfo,
    Run,
    become_coordinator,
    copy_over_wire,
    correct_clock,
    expire_tasks_of_a_lost_executor,
    forget_messages_of_ended_runs,
    known_paths,
    patient_retries,
    quiet_flower,
    readable_reason,
    run_fab,
    run_node,
    set_message_id,
    set_source,
)
from fedtune.wire.flower import TRAIN, from_record, to_record


def message() -> Message:
    become_coordinator(5)
    return Message(to_record(TRAIN, b"body", b"tensors"), 1000, TRAIN, ttl=9.0, group_id="2")


def test_a_coordinator_can_create_messages_of_its_run() -> None:
    metadata = message().metadata
    assert (metadata.run_id, metadata.src_node_id) == (5, SUPERLINK_NODE_ID)


def test_a_copy_over_the_wire_is_equal_and_shares_nothing() -> None:
    sent = message()
    set_message_id(sent, "message-7")
    arrived, size = copy_over_wire(sent)
    assert from_record(arrived.content, TRAIN) == (b"body", b"tensors")
    assert vars(arrived.metadata) == vars(sent.metadata)
    assert arrived.content is not sent.content
    assert arrived.content["fedtune"] is not sent.content["fedtune"]
    assert size > len(b"body") + len(b"tensors")


def test_a_reply_refers_to_the_id_that_was_set() -> None:
    sent = message()
    set_message_id(sent, "message-7")
    reply = Message(RecordDict(), reply_to=sent)
    set_source(reply, 77)
    assert reply.metadata.reply_to_message_id == "message-7"
    assert reply.metadata.src_node_id == 77
    assert reply.metadata.group_id == "2"


def test_an_error_reply_survives_the_wire() -> None:
    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message())
    arrived, _ = copy_over_wire(reply)
    assert arrived.has_error()
    assert (arrived.error.code, arrived.error.reason) == (5, "gone")


def test_the_codes_that_a_coordinator_sees_are_these() -> None:
    assert ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2
    assert ErrorCode.MESSAGE_UNAVAILABLE == 3
    assert ErrorCode.NODE_UNAVAILABLE == 5


def test_a_run_and_a_node_can_be_made() -> None:
    assert Run.create_empty(5).run_id == 5
    assert NodeInfo(node_id=3, name="device-0", status="online").name == "device-0"


def test_flower_is_quiet_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    logger = logging.getLogger("flwr")
    before = logger.level
    with quiet_flower():
        assert logger.level == logging.ERROR
        assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert (logger.level, telemetry.FLWR_TELEMETRY_ENABLED) == (before, "1")


def test_telemetry_that_a_person_asked_for_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    with quiet_flower():
        assert telemetry.FLWR_TELEMETRY_ENABLED == "1"


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (None, ""),
        ("the node is offline", "the node is offline"),
        ("<class 'ValueError'>:<'two\nlines'>", "ValueError: two"),
        (
            "<class 'fedtune.errors.PlanError'>:<'needs 3 GB, has 2 GB'>",
            "needs 3 GB, has 2 GB",
        ),
        (
            "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::run()\x1b[39m"
            '\n  File "a.py", line 3\n\nException ClientAppException occurred. Message: boo\'>',
            "boo",
        ),
    ],
)
def test_a_reason_is_one_line_for_a_person(reason: str | None, line: str) -> None:
    assert readable_reason(reason) == line


# ---------------------------------------------------------------- a deployment's private names


def test_a_runs_bundle_is_its_configuration_and_no_code() -> None:
    from flwr.common.config import get_fused_config_from_fab

    config = {"fedtune-run": "nördlich", "fedtune-task": '{"a": "b\\n\x7f"}'}
    fab = run_fab(config)
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]
    assert get_fused_config_from_fab(fab, Run.create_empty(1)) == config
    assert len(fab) < 10_000


def test_the_links_paths_are_known() -> None:
    fleet = known_paths("/v1/fleet/")
    assert {"/v1/fleet/activate-node", "/v1/fleet/push-object"} <= fleet
    assert {"/v1/control/start-run", "/v1/control/list-nodes"} <= known_paths("/v1/control/")
    assert {"/v1/runtime/acquire-task", "/v1/runtime/push-task-output"} <= known_paths(
        "/v1/runtime/"
    )
    assert all(re.fullmatch(r"/v1/fleet/[a-z-]+", path) for path in fleet)


def test_an_offset_moves_every_clock_of_flower_and_only_those(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.app.message import message as flowers_message
    from flwr.supercore import date

    before, here = date.now, flowers_message.now
    monkeypatch.setattr(date, "now", before)  # put back after the test
    monkeypatch.setattr(flowers_message, "now", here)
    changed = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("flwr.") and getattr(module, "now", None) is before
    ]
    try:
        correct_clock(lambda: 3600.0)
        ahead = (flowers_message.now() - datetime.datetime.now(datetime.UTC)).total_seconds()
        assert 3599 < ahead < 3601
        assert all(module.now is date.now for module in changed)
    finally:
        for module in changed:
            module.now = before


def retried(error: Exception) -> bool:
    invoker = patient_retries()
    invoker.wait_function = lambda seconds: None
    calls = []

    def target() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return "answered"

    try:
        return bool(invoker.invoke(target) == "answered")
    except type(error):
        return False


@pytest.mark.parametrize(
    ("status", "again"), [(500, True), (429, True), (503, True), (401, False), (404, False)]
)
def test_retries_outlast_what_passes_and_nothing_else(status: int, again: bool) -> None:
    request = httpx.Request("POST", "https://link/")
    answer = httpx.Response(status, text="", request=request)
    assert retried(httpx.HTTPStatusError("", request=request, response=answer)) is again


def test_the_absence_of_a_link_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    invoker = patient_retries()
    counted = flwr_compat._Absence(invoker)
    for at, elapsed_s, tries in (
        (110.0, 8.0, 4),
        (111.0, 9.0, 5),
        (120.0, 7.0, 1),
        (130.0, 3.0, 2),
    ):
        now[0] = at
        invoker.on_success(SimpleNamespace(elapsed_time=elapsed_s, tries=tries))
    assert counted.seconds() == 8.0 + 1.0 + 3.0
    assert flwr_compat.absence(object())() == 0.0


def test_a_link_that_is_back_is_found_soon() -> None:
    waits = itertools.islice(patient_retries().wait_gen_factory(), 9)
    assert max(waits) <= flwr_compat.LONGEST_RETRY_S


def test_a_link_that_breaks_a_handshake_is_asked_again() -> None:
    assert retried(httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] ..."))


def test_a_site_that_was_stopped_is_not_taken_for_a_broken_link() -> None:
    request = httpx.Request("POST", "https://link/")
    answer = httpx.Response(403, text="", request=request)
    invoker = patient_retries()
    with pytest.raises(RunNotRunningException):
        invoker.invoke(
            lambda: (_ for _ in ()).throw(
                httpx.HTTPStatusError("", request=request, response=answer)
            )
        )


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("flwr.superlink.cli.flower_superlink", "_parse_superlink_lifespan_config"),
        ("flwr.superlink.cli.flower_superlink", "SuperLinkLifespan"),
        ("flwr.superlink.main", "create_app"),
        ("flwr.superlink.servicer.fleet.fleet_handlers", "activate_node"),
        ("flwr.superlink.servicer.runtime.runtime_handlers", "pull_messages"),
        ("flwr.superlink.servicer.runtime.runtime_handlers", "confirm_message_received"),
        ("flwr.supercore.sql_mixin", "SQLITE_PRAGMAS"),
        ("flwr.supercore.corestate.sql_corestate", "HEARTBEAT_PATIENCE"),
        ("flwr.supernode.cli.flower_supernode", "flower_supernode"),
        ("flwr.supernode.cli.flower_supernode", "uvicorn"),
        ("flwr.supernode.main", "create_app"),
        ("flwr.supernode.fleet_http_connection", "make_simple_http_retry_invoker"),
        ("flwr.supernode.fleet_http_connection", "HeartbeatSender"),
        ("flwr.supernode.fleet_http_connection", "NodeAuthHttpInterceptor"),
        ("flwr.supernode.fleet_http_connection", "FleetHttpClient"),
        ("flwr.supernode.servicer.runtime.runtime_handlers", "acquire_task"),
        ("flwr.supernode.runtime.run_clientapp", "pull_task_input"),
        ("flwr.supernode.runtime.run_clientapp", "push_message"),
        ("flwr.supernode.runtime.run_clientapp", "push_task_output"),
        ("flwr.supercore.exit.exit", "FORCE_EXIT_TIMEOUT_SECONDS"),
        ("flwr.supercore.heartbeat", "HeartbeatSender"),
        ("flwr.superlink.grid", "HttpGrid"),
        ("flwr.supercore.control", "ControlHttpClient"),
        ("flwr.supercore.runtime", "RuntimeHttpClient"),
        ("flwr.common.constant", "NOOP_FLWR_AID"),
        ("flwr.common.constant", "NOOP_ACCOUNT_NAME"),
    ],
)
def test_a_name_that_is_replaced_or_called_is_there(module: str, names: str) -> None:
    assert hasattr(importlib.import_module(module), names)


def test_a_nodes_server_leaves_the_log_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    connection = importlib.import_module("flwr.supernode.fleet_http_connection")
    flower_exit = importlib.import_module("flwr.supercore.exit.exit")
    for module, name in (
        (command, "uvicorn"),
        (connection, "make_simple_http_retry_invoker"),
        (connection, "HeartbeatSender"),
        (flower_exit, "FORCE_EXIT_TIMEOUT_SECONDS"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    seen: list[object] = []

    def flower_supernode() -> None:
        seen.append(command.uvicorn.Config(print))

    monkeypatch.setattr(command, "flower_supernode", flower_supernode)
    run_node([])
    assert [getattr(config, "log_config", "?") for config in seen] == [None]


def test_a_node_waits_two_heartbeats_and_a_query_for_its_lock() -> None:
    from flwr.common import constant
    from flwr.supercore.sql_mixin import SQLITE_PRAGMAS

    assert constant.HEARTBEAT_PATIENCE == HEARTBEAT_PATIENCE
    assert constant.HEARTBEAT_DEFAULT_INTERVAL == 30
    assert "busy_timeout" in dict(SQLITE_PRAGMAS)


def test_a_killed_executors_task_is_answered_for_when_the_next_one_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory
    from flwr.supernode.servicer.runtime import runtime_handlers

    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.set_node_id(9)
    monkeypatch.setattr(runtime_handlers, "acquire_task", runtime_handlers.acquire_task)
    expire_tasks_of_a_lost_executor()
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    task_id = state.create_task(task_type=TaskType.CLIENT_APP, run_id=5, fab_hash="f")
    assert runtime_handlers.acquire_task(request, state).task.task_id == task_id
    assert state.activate_task(task_id)
    assert not runtime_handlers.acquire_task(request, state).token
    (task,) = state.get_tasks(task_ids=[task_id])
    assert (task.status.status, task.status.sub_status) == ("finished", "failed")


def test_half_a_reply_of_a_killed_executor_is_told_when_the_next_one_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory
    from flwr.supernode.servicer.runtime import runtime_handlers

    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.set_node_id(9)
    monkeypatch.setattr(runtime_handlers, "acquire_task", runtime_handlers.acquire_task)
    told: list[bool] = []
    expire_tasks_of_a_lost_executor(lambda: told.append(True))
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    asked = message()
    set_message_id(asked, asked.object_id)
    reply = Message(RecordDict(), reply_to=asked)
    set_message_id(reply, reply.object_id)
    session = state.start_session(reply.metadata.run_id)
    assert state.store_message_and_object_tree(reply, get_object_tree(reply), session)[0]
    runtime_handlers.acquire_task(request, state)
    assert told == [True]
    for object_id, each in get_all_nested_objects(reply).items():
        state.object_store.put(object_id, each.deflate())
    runtime_handlers.acquire_task(request, state)
    assert told == [True]


def test_a_message_whose_run_ends_while_it_comes_leaves_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.supercore.inflatable.inflatable_object import get_object_tree
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.run import Run, RunNotRunningException
    from flwr.supernode import start_client_internal
    from flwr.supernode.nodestate import NodeStateFactory

    def ended(*_: object, **__: object) -> None:
        raise RunNotRunningException

    store = ObjectStoreFactory().store()
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    state.set_node_id(9)
    run = Run.create_empty(5)
    monkeypatch.setattr(state, "get_run", lambda run_id: run)
    monkeypatch.setattr(state, "get_run_series_context", lambda series_id: object())
    monkeypatch.setattr(start_client_internal, "pull_objects", ended)
    forget_messages_of_ended_runs()
    sent = message()
    set_message_id(sent, "message-7")
    start_client_internal._pull_and_store_message(
        state=state,
        object_store=store,
        node_config={},
        receive=lambda: (sent, get_object_tree(sent)),
        get_run=lambda run_id: run,
        get_fab=ended,
        pull_object=ended,
        confirm_message_received=ended,
        trusted_entities=None,
    )
    (task,) = state.get_tasks()
    assert (task.status.status, task.status.sub_status) == ("finished", "failed")
    assert "its run has ended" in task.status.details


def test_a_message_that_its_node_does_not_get_is_a_lost_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
    from flwr.supernode.runtime import run_clientapp

    def fail(client: object) -> None:
        raise ObjectPullError("object-7", "no longer there")

    monkeypatch.setattr(run_clientapp, "pull_task_input", fail)
    task = ClientTask.__new__(ClientTask)
    task._client = None
    with pytest.raises(RuntimeError, match="object-7"):
        task.receive()


def test_the_links_database_learns_of_nodes_and_forgets_them(tmp_path: Path) -> None:
    code = (
        "import sys; from fedtune.flwr_compat import LinkNodes, link_app\n"
        "from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes\n"
        "key = public_key_to_bytes(generate_key_pairs()[1])\n"
        f"app = link_app(['--insecure', '--isolation', 'process', '--database',"
        f" {str(tmp_path / 'state.db')!r}], print)\n"
        "nodes = LinkNodes(app); node = nodes.register(key)\n"
        "assert nodes.register(key) == node == nodes.make_ready(key)\n"
        "state = app.state.linkstate_factory.state()\n"
        "assert state.activate_node(node, 30) and not state.activate_node(node, 30)\n"
        "assert nodes.make_ready(key) == node and state.activate_node(node, 30)\n"
        "nodes.forget(node); nodes.forget(7)\n"
        "from flwr.supercore.corestate import sql_corestate\n"
        "assert sql_corestate.HEARTBEAT_PATIENCE == 5\n"
    )
    environment = {**os.environ, "FLWR_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_link_delivers_again_what_was_lost_on_its_way(tmp_path: Path) -> None:
    program = Path(__file__).with_name("link_redelivers.py")
    paths = [str(Path(fedtune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "state.db")],
        env={**os.environ, "FLWR_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what a link and arrays cost


def test_each_layer_that_is_left_out_elsewhere_is_one_of_flowers() -> None:
    from flwr.superlink import main

    names = {layer.cls.__name__ for layer in main._get_middleware()}
    names.add("RuntimeTracingMiddleware")  # of 1.41 alone
    assert names >= set(flwr_compat._LAYERS) | flwr_compat._UNUSED


def test_layers_are_left_out_of_requests_that_do_not_concern_them() -> None:
    class NodeAuthMiddleware:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(f"checked {scope.get('path')}")
            await self.app(scope, receive, send)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append("served")

    seen: list[str] = []
    (layer,) = flwr_compat._only_where_they_act([Middleware(NodeAuthMiddleware)])
    wrapped = layer.cls(app)
    for scope in (
        {"type": "http", "path": "/v1/fleet/pull-messages"},
        {"type": "http", "path": "/v1/runtime/get-nodes"},
        {"type": "lifespan"},
    ):
        asyncio.run(wrapped(scope, None, None))
    assert seen == [
        "checked /v1/fleet/pull-messages", "served", "served", "checked None", "served"
    ]  # fmt: skip


def test_a_link_looks_for_lost_tasks_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        looks = 0

        def _cleanup_expired_task_tokens(self) -> None:
            self.looks += 1

    moments = iter((1000.0, 1000.9, 1001.0, 1001.1))
    monkeypatch.setattr(flwr_compat.time, "monotonic", lambda: next(moments))
    flwr_compat._look_for_lost_tasks_once_a_second(State)
    state = State()
    for _ in range(4):
        state._cleanup_expired_task_tokens()
    assert state.looks == 2


def test_an_array_in_pieces_comes_out_as_it_went_in() -> None:
    flwr_compat.lean_transfers()
    flwr_compat.lean_transfers()
    for data in (bytes(range(256)) * 50_000, bytes(12_000_000), b""):
        array = Array("uint8", (len(data),), "ours", data)
        record = RecordDict({"tensors": ArrayRecord({"packed": array})})
        contents = {name: each.deflate() for name, each in get_all_nested_objects(record).items()}
        found = inflate_object_from_contents(record.object_id, contents)
        assert isinstance(found, RecordDict)
        assert found.array_records["tensors"]["packed"].data == data
        assert found.object_id == record.object_id


def test_objects_exist_in_bytes_only_while_they_are_sent() -> None:
    made, sent = 0, 0

    def contents() -> Iterator[tuple[str, bytes]]:
        nonlocal made
        for number in range(20):
            made += 1
            assert made - sent <= 3  # two under way, and the one that is being made
            yield str(number), b"content"

    def push(name: str, content: bytes) -> None:
        nonlocal sent
        time.sleep(0.002)
        sent += 1

    flwr_compat.lean_transfers()
    inflatable_utils.push_object_contents_from_iterable(contents(), push)
    assert sent == 20


def test_a_push_that_fails_ends_the_others() -> None:
    def push(name: str, content: bytes) -> None:
        raise ValueError(f"object {name}")

    flwr_compat.lean_transfers()
    endless = ((str(number), b"content") for number in itertools.count())
    with pytest.raises(ValueError, match="object"):
        inflatable_utils.push_object_contents_from_iterable(endless, push)
