"""A ledger can be checked line by line, and continued after a crash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from fedtune.errors import RunError
from fedtune.records import Event
from fedtune.wire.ledger_chain import verify_ledger
from fedtune_server.ledger import Ledger, last_run, training_ended


def write(path: Path, count: int = 4) -> None:
    with Ledger(path) as ledger:
        for number in range(count):
            ledger.append(Event("round_finished", {"round": number, "name": "Süd\u2028x"}))


def test_every_line_has_its_number_time_kind_fields_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, 2)
    lines = path.read_bytes().split(b"\n")
    entries = [json.loads(line) for line in lines[:2]]
    assert lines[2:] == [b""]
    for seq, entry in enumerate(entries):
        assert list(entry) == ["seq", "time", "kind", "round", "name", "prev", "hash"]
        assert (entry["seq"], entry["kind"], entry["round"]) == (seq, "round_finished", seq)
        assert abs((datetime.now(UTC) - datetime.fromisoformat(entry["time"])).seconds) < 60
    assert entries[0]["prev"] == "0" * 64
    assert entries[1]["prev"] == hashlib.sha256(lines[0]).hexdigest()
    without_hash = lines[0][: lines[0].rindex(b',"hash"')] + b"}"
    assert entries[0]["hash"] == hashlib.sha256(without_hash).hexdigest()


def test_a_good_ledger_is_returned_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path)
    assert [entry["round"] for entry in verify_ledger(path)] == [0, 1, 2, 3]
    (tmp_path / "empty").write_bytes(b"")
    assert verify_ledger(tmp_path / "empty") == []


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger(Event("round_finished", {"loss": float("nan"), "list": [float("inf")]}))
    entry = verify_ledger(path)[0]
    assert (entry["loss"], entry["list"]) == (None, [None])


def test_a_ledger_is_continued_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path, 2)
    write(path, 2)
    assert [entry["seq"] for entry in verify_ledger(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"seq":4,"ti', b"{", b'{"seq":4}'])
def test_a_line_torn_by_a_crash_is_removed_on_continuing(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path)
    with path.open("ab") as file:
        file.write(torn)
    with pytest.raises(RunError, match="line 5"):
        verify_ledger(path)
    write(path, 1)
    assert [entry["seq"] for entry in verify_ledger(path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fault", ["write", "fsync"])
def test_a_line_that_the_disk_does_not_take_leaves_the_chain_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "ledger.jsonl"

    class Full:
        """A file on a disk that has room for ten more bytes."""

        def __init__(self, file: BinaryIO) -> None:
            self._file, self._room = file, 10

        def write(self, data: bytes) -> int:
            written = self._file.write(data[: self._room])
            self._room -= written
            if written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Ledger(path) as ledger:
        ledger.append(Event("round_finished", {"round": 0}))
        with monkeypatch.context() as patch:
            if fault == "write":
                patch.setattr(ledger, "_file", Full(ledger._file))  # type: ignore[arg-type]
            else:
                patch.setattr(os, "fsync", no_room)
            with pytest.raises(RunError, match=r"ledger.jsonl cannot be written \(No space left"):
                ledger.append(Event("round_finished", {"round": 1}))
        ledger.append(Event("run_failed", {"reason": "no space"}))
    assert [entry["kind"] for entry in verify_ledger(path)] == ["round_finished", "run_failed"]


def test_a_ledger_says_whether_the_training_ended_and_of_which_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert (training_ended(path), last_run(path)) == (False, "")
    kinds = ["run_started", "round_started", "round_finished", "run_finished", "run_failed"]
    ended = []
    with Ledger(path) as ledger:
        for kind in [*kinds, "run_resumed", "round_started", "run_interrupted"]:
            ledger.append(Event(kind, {"run": "a-1"} if "run_r" in kind or "_st" in kind else {}))
            ended.append(training_ended(path))
    assert ended == [False, False, False, True, True, True, False, False]
    assert last_run(path) == "a-1"


def _change(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round":1', b'"round":9'), *lines[2:]]


def _change_and_seal(lines: list[bytes]) -> list[bytes]:
    body = lines[1][: lines[1].rindex(b',"hash"')].replace(b'"round":1', b'"round":9')
    digest = hashlib.sha256(body + b"}").hexdigest().encode()
    return [lines[0], body + b',"hash":"' + digest + b'"}', *lines[2:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change, "line 2: hash is not that of the line"),
        (_change_and_seal, "line 3: prev is not the hash of the line before"),
        (lambda lines: lines[:1] + lines[2:], "line 2: expected seq 1, got 2; lines are missing"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: expected seq 0, got 1"),
        (lambda lines: [*lines[:2], b"", *lines[2:]], "line 3: expected a JSON object"),
        (lambda lines: [*lines[:3], b"[1]"], "line 4: expected a JSON object"),
        (lambda lines: [*lines[:3], b"\xff"], "line 4: expected a JSON object"),
        (lambda lines: [lines[0].replace(b"{", b"{ ", 1), *lines[1:]], "line 1: hash is not that"),
    ],
)
def test_the_first_broken_line_is_named(tmp_path: Path, change: object, words: str) -> None:
    path = tmp_path / "ledger.jsonl"
    write(path)
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"\n".join(change(lines)) + b"\n")  # type: ignore[operator]
    with pytest.raises(RunError, match=words):
        verify_ledger(path)


def test_a_missing_ledger_and_another_file_are_errors_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        verify_ledger(tmp_path / "none")
    (tmp_path / "other").write_text("hello\n", encoding="utf-8")
    with pytest.raises(RunError, match="line 1: expected seq 0 in a JSON object"):
        Ledger(tmp_path / "other")


@pytest.mark.parametrize("name", ["seq", "time", "prev", "hash", "kind"])
def test_a_field_cannot_have_the_name_of_the_ledgers_own(tmp_path: Path, name: str) -> None:
    with Ledger(tmp_path / "l") as ledger, pytest.raises(ValueError, match=f"called {name}"):
        ledger.append(Event("warning", {name: 1}))
    assert verify_ledger(tmp_path / "l") == []


def test_threads_may_share_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        threads = [
            threading.Thread(
                target=lambda: [ledger.append(Event("warning", {"text": "x"})) for _ in range(50)]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(verify_ledger(path)) == 200
