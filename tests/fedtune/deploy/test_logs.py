from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import logs
from fedtune.deploy.journal import Journal
from fedtune.deploy.logs import RotatingFile, configure, log_record, parse_line


@pytest.fixture
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.delenv("FEDTUNE_SUPERVISOR", raising=False)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("logging_restored")
def test_a_process_alone_writes_json_lines_to_its_own_file(tmp_path: Path) -> None:
    flower = logging.getLogger("flwr")
    flower.addHandler(logging.NullHandler())
    flower.propagate = False
    configure("link", tmp_path)
    logging.getLogger("fedtune_server.link").info(
        "listening on %d", 9400, extra={"fields": {"port": 9400}}
    )
    flower.warning("a node left\nat night")
    logging.getLogger("uvicorn.error").error("no")
    logging.getLogger("httpx").info("HTTP Request: POST https://h/v1/fleet/pull-messages 200")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("x").exception("failed")
    logging.getLogger("x").info("%d", "not a number")
    found = entries(tmp_path / "link.log")
    assert [e["message"] for e in found] == [
        "listening on 9400",
        "a node left\nat night",
        "no",
        "failed",
        "%d ('not a number',)",
    ]
    assert found[0]["fields"] == {"port": 9400}
    assert found[0]["time"].endswith("Z")
    assert found[1]["logger"] == "flwr"
    assert "ValueError: bad" in found[3]["exception"]
    assert not flower.handlers


@pytest.mark.usefixtures("logging_restored")
def test_what_nobody_caught_and_warnings_are_logged(tmp_path: Path) -> None:
    configure("desk", tmp_path)
    error = ValueError("lost")
    sys.excepthook(ValueError, error, None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    found = entries(tmp_path / "desk.log")
    assert found[0]["level"] == "critical"
    assert found[0]["message"] == "ValueError: lost"
    assert "old" in found[-1]["message"]


@pytest.mark.usefixtures("logging_restored")
def test_under_a_supervisor_lines_go_to_the_error_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_SUPERVISOR", "mark")
    configure("link", tmp_path)
    logging.getLogger("x").info("hello")
    assert json.loads(capsys.readouterr().err)["message"] == "hello"
    assert not list(tmp_path.iterdir())


def test_files_rotate_and_never_pass_their_number(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "link.log", most_bytes=1000, keep=3)
    for number in range(200):
        file.write(f"line {number:04d} " + "x" * 40)
    file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["link.log", "link.log.1", "link.log.2"]
    assert all(path.stat().st_size <= 1000 + 51 for path in tmp_path.iterdir())
    kept = "".join((tmp_path / name).read_text() for name in reversed(names)).splitlines()
    assert [line.split()[1] for line in kept] == [f"{n:04d}" for n in range(200)][-len(kept) :]


def test_a_file_is_continued_after_a_restart(tmp_path: Path) -> None:
    for number in range(3):
        file = RotatingFile(tmp_path / "link.log", most_bytes=1000, keep=2)
        file.write(f"line {number}")
        file.close()
    assert (tmp_path / "link.log").read_text() == "line 0\nline 1\nline 2\n"


def test_a_full_disk_loses_lines_and_says_so_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RotatingFile(tmp_path / "link.log")
    file.write('{"message": "before"}')
    write, room = os.write, [10]

    def full(handle: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part, room[0] = content[: room[0]], 0
        return write(handle, part)

    monkeypatch.setattr(logs, "_RETRY_S", 0.0)
    monkeypatch.setattr(os, "write", full)
    for _ in range(4):
        file.write('{"message": "lost"}')
    monkeypatch.setattr(os, "write", write)
    file.write('{"message": "after"}')
    file.close()
    lines = (tmp_path / "link.log").read_text().splitlines()
    assert lines[0] == '{"message": "before"}'
    assert lines[1] == '{"message"'  # what the disk had room for
    told, after = json.loads(lines[2]), json.loads(lines[3])
    assert told["message"].startswith("4 lines of this log were lost")
    assert after == {"message": "after"}


def test_a_full_disk_is_not_asked_again_for_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    file = RotatingFile(tmp_path / "link.log")
    for _ in range(100):
        file.write("line")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("INFO :      started", "info"),
        ("WARNING: old", "warning"),
        ("Traceback (most recent call last):", "error"),
        ("sqlite3.OperationalError: database is locked", "error"),
        ("[1, 2]", "info"),
        ('{"message": 3, "level": "info"}', "info"),
        ('{"message": "x", "level": "loud"}', "info"),
        ("{" * 100_000, "info"),
        ('{"a":' * 20_000, "info"),
        ("", "info"),
    ],
)
def test_text_becomes_the_message_of_a_record(line: str, level: str) -> None:
    found = parse_line("link", line + "\n")
    assert (found["level"], found["process"]) == (level, "link")
    assert found["message"] == line[: logs.MOST_LINE_CHARACTERS]


def test_a_reader_that_stands_still_or_is_gone_does_not_stop_the_journal(tmp_path: Path) -> None:
    blocked = threading.Event()
    journal = Journal(tmp_path, lambda record: blocked.wait(20) and None)
    for number in range(5000):
        journal.add("link", log_record("link", "info", f"{number}"))
    journal.close()
    blocked.set()
    assert len(entries(tmp_path / "link.log")) == 5000

    def gone(record: object) -> None:
        raise BrokenPipeError

    journal = Journal(tmp_path, gone)
    journal.say("info", "one")
    journal.say("info", "two")
    journal.close()
    assert [e["message"] for e in entries(tmp_path / "supervisor.log")] == ["one", "two"]
