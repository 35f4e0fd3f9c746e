"""Reading on in a ledger that grows, is torn, is not there yet, or is replaced."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune.export.ledger_tail import LedgerTail, fields_of, line_time
from fedtune.records import Event
from fedtune_server.ledger import Ledger


def say(path: Path, *texts: str) -> None:
    with Ledger(path) as ledger:
        for text in texts:
            ledger(Event("warning", {"text": text}))


def texts(tail: LedgerTail) -> list[object]:
    return [line["text"] for line in tail.read().lines]


def test_each_line_is_read_once_and_the_file_may_come_later(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    tail = LedgerTail(path)
    assert texts(tail) == []
    say(path, "a", "b\u2028c")
    assert texts(tail) == ["a", "b\u2028c"]
    assert texts(tail) == []
    say(path, "d")
    assert texts(tail) == ["d"]


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    say(path, "a", "b")
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        tail = LedgerTail(path)
        path.write_bytes(data[:cut])
        before = texts(tail)
        path.write_bytes(data)
        assert before + texts(tail) == ["a", "b"]


def test_half_a_line_that_a_continued_run_cuts_off_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    say(path, "a")
    with path.open("ab") as file:
        file.write(b'{"seq":1,"text":"torn')
    tail = LedgerTail(path)
    assert texts(tail) == ["a"]
    say(path, "b")  # cuts the half line off, as a coordinator does that continues
    news = tail.read()
    assert ([line["text"] for line in news.lines], news.anew) == (["b"], False)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_another_ledger_in_its_place_is_read_from_its_first_line(
    tmp_path: Path, count: int
) -> None:
    path = tmp_path / "ledger.jsonl"
    say(path, "a", "b", "c")
    tail = LedgerTail(path)
    assert not tail.read().anew
    path.unlink()
    assert tail.read().lines == ()  # replaced, and not yet begun
    say(path, *(f"new {i}" for i in range(count)))
    news = tail.read()
    assert news.anew
    assert [line["text"] for line in news.lines] == [f"new {i}" for i in range(count)]
    assert not tail.read().anew


def test_a_line_that_is_none_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    say(path, "a")
    with path.open("ab") as file:
        file.write(b"[1]\n")
    with pytest.raises(RunError, match=r"line 2 of .* is not a JSON object; check the ledger with"):
        LedgerTail(path).read()
    with pytest.raises(RunError, match="cannot be read"):
        LedgerTail(tmp_path).read()


def test_an_event_is_what_is_left_of_a_line_without_the_ledgers_own(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    say(path, "a")
    (line,) = LedgerTail(path).read().lines
    assert fields_of(line) == {"text": "a"}
    time = line_time(line)
    assert time is not None
    assert abs((datetime.now(UTC) - time).total_seconds()) < 60
    assert line_time({"time": "yesterday"}) is None
    assert line_time(json.loads('{"time": "2026-01-02T03:04:05"}')) == datetime(
        2026, 1, 2, 3, 4, 5, tzinfo=UTC
    )
