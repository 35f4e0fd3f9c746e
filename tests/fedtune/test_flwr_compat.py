"""What the coordinator expects of Flower's private names; fails when a release moves them."""

from __future__ import annotations

import logging

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore import telemetry

from fedtune.flwr_compat import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    NodeInfo,
    Run,
    become_coordinator,
    copy_over_wire,
    quiet_flower,
    readable_reason,
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
