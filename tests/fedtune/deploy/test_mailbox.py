"""Questions and answers as files, whoever dies in between."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from fedtune.deploy import mailbox
from fedtune.deploy.mailbox import Answer, Mailbox
from fedtune.errors import ProtocolError


@pytest.fixture
def box(tmp_path: Path) -> Mailbox:
    return Mailbox(tmp_path / "groups" / "east")


def test_a_question_and_its_answer_keep_their_bytes(box: Mailbox) -> None:
    number = box.ask("train.lora", {"link": 1.5}, b"body", b"tensors")
    other = Mailbox(box.folder)
    asked = other.take()
    assert asked is not None
    assert (asked.id, asked.kind, asked.about) == (number, "train.lora", {"link": 1.5})
    assert (asked.body, asked.tensors) == (b"body", b"tensors")
    assert box.answer_to(number) is None
    other.answer(number, Answer("", b"said", b"learnt"))
    assert box.answer_to(number) == Answer("", b"said", b"learnt")
    box.clear()
    assert list(box.folder.iterdir()) == []


def test_a_question_without_tensors_has_none(box: Mailbox) -> None:
    number = box.ask("query.profile", {}, b"", None)
    asked = box.take()
    assert asked is not None
    assert asked.tensors is None
    box.answer(number, Answer("no device can take part"))
    assert box.answer_to(number) == Answer("no device can take part")


def test_a_new_question_takes_the_place_of_the_old_and_of_its_answer(box: Mailbox) -> None:
    first = box.ask("train.lora", {}, b"1", b"1")
    box.answer(first, Answer("", b"late"))
    second = box.ask("train.lora", {}, b"2", None)
    assert box.asked() == second
    assert box.answer_to(second) is None
    assert {path.name for path in box.folder.iterdir()} == {f"{second}.body", "ask.json"}


def test_a_question_that_is_taken_back_between_two_looks_is_none(box: Mailbox) -> None:
    number = box.ask("train.lora", {}, b"1", None)
    (box.folder / f"{number}.body").unlink()
    assert box.take() is None
    box.clear()
    assert box.asked() is None


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"[]", b"[" * 100_000, b'{"id": "../../etc/passwd", "kind": "a", "about": {}}',
     b'{"id": 5}', json.dumps({"id": "0" * 32, "kind": 1, "about": {}}).encode()],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(box: Mailbox, content: bytes) -> None:
    (box.folder / "ask.json").write_bytes(content)
    with pytest.raises(ProtocolError, match=r"ask\.json"):
        box.take()


def test_what_is_too_large_is_not_read(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    box.ask("train.lora", {}, b"1", b"12345")
    monkeypatch.setattr(mailbox, "MOST_TENSORS", 4)
    with pytest.raises(ProtocolError, match="expected at most 4 bytes"):
        box.take()


def test_who_answers_is_known_to_be_there(box: Mailbox) -> None:
    assert box.silent_s() is None
    box.alive()
    found = box.silent_s()
    assert found is not None
    assert found < 30
    past = time.time() - 500
    os.utime(box.folder / "alive", (past, past))
    found = box.silent_s()
    assert found is not None
    assert 450 < found < 600
    box.alive()
    found = box.silent_s()
    assert found is not None
    assert found < 30


@pytest.mark.skipif(sys.platform == "win32", reason="mode bits of POSIX")
def test_nobody_else_reads_it(box: Mailbox) -> None:
    box.ask("train.lora", {}, b"1", b"2")
    assert box.folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in box.folder.iterdir())
