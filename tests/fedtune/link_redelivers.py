"""A link whose answers are lost; run by test_flwr_compat.py in a process of its own."""

from __future__ import annotations

import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedtune.flwr_compat import (
    LinkNodes,
    become_coordinator,
    error_reply,
    link_app,
    set_message_id,
    set_source,
)
from fedtune.wire.flower import TRAIN, to_record


def main(database: str) -> None:
    app = link_app(["--insecure", "--isolation", "process", "--database", database], print)
    state = app.state.linkstate_factory.state()
    node = LinkNodes(app).make_ready(public_key_to_bytes(generate_key_pairs()[1]))
    assert state.activate_node(node, 30)
    run = state.create_run(
        None, None, "9f86d08", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    (made,) = state.get_run_info(run_ids=[run])
    assert state.claim_task(made.primary_task_id)
    assert state.activate_task(made.primary_task_id)
    become_coordinator(run)
    order = Message(to_record(TRAIN, b"body", b"tensors"), node, TRAIN, ttl=90.0, group_id="2")
    announced = announce(state, run, order)
    assert of_node(state, node) == [], "its parts are not there"
    put(state, run, *announced)
    node_polls(state, node, run, order)
    reply = error_reply(order, ValueError("no"))
    set_source(reply, node)
    announced = announce(state, run, reply)
    assert of_coordinator(state, run, order) == [], "its parts are not there"
    put(state, run, *announced)
    coordinator_polls(state, run, order, reply)


def announce(state: Any, run: int, message: Message) -> tuple[str, dict[str, bytes]]:
    """Push a message without its parts; the session in which they may follow, and the parts."""
    set_message_id(message, message.object_id)
    session = state.start_session(run)
    stored, wanted = state.store_message_and_object_tree(message, get_object_tree(message), session)
    assert stored
    objects = get_all_nested_objects(message)
    return session, {name: objects[name].deflate() for name in objects if name in wanted}


def put(state: Any, run: int, session: str, parts: dict[str, bytes]) -> None:
    """Push a message's parts."""
    for name, content in parts.items():
        assert state.store_object(run, session, name, content)
        assert state.store_object(run, session, name, content), "the answer to its push was lost"
        assert not state.store_object(run, session, name, content[:-1] + b"?")


def of_node(state: Any, node: int) -> list[str]:
    """Messages that a node is given."""
    request = PullMessagesRequest(node=Node(node_id=node))
    answer = fleet_handlers.pull_messages(request, state, state.object_store)
    return [message.metadata.message_id for message in answer.messages_list]


def of_coordinator(state: Any, run: int, order: Message) -> list[str]:
    """Replies to an order that a run is given."""
    request = PullAppMessagesRequest(message_ids=[order.metadata.message_id])
    answer = runtime_handlers.pull_messages(request, state, SimpleNamespace(run_id=run))
    return [message.metadata.message_id for message in answer.messages_list]


def node_polls(state: Any, node: int, run: int, order: Message) -> None:
    polled = partial(of_node, state, node)
    (name,) = polled()
    assert polled() == [name], "its first answer was lost"
    assert polled() == [], "a node that fails to take a message is not flooded with it"
    time.sleep(1.1)
    assert polled() == [name]
    state.deactivate_node(node)
    state.activate_node(node, 30)
    time.sleep(3.1)
    assert polled() == [], "the coordinator asks a node anew that came back"
    confirm = ConfirmMessageReceivedRequest(
        node=Node(node_id=node), run_id=run, message_object_id=name
    )
    fleet_handlers.confirm_message_received(confirm, state, state.object_store)
    assert polled() == []


def coordinator_polls(state: Any, run: int, order: Message, reply: Message) -> None:
    task = SimpleNamespace(run_id=run)

    polled = partial(of_coordinator, state, run, order)
    (name,) = polled()
    assert name == reply.metadata.message_id
    assert polled() == [name], "its first answer was lost"
    confirm = ConfirmMessageReceivedRequest(
        node=Node(node_id=SUPERLINK_NODE_ID), run_id=run, message_object_id=name
    )
    runtime_handlers.confirm_message_received(confirm, state, task)
    assert (state.num_message_ins(), state.num_message_res()) == (0, 0)


main(sys.argv[1])
