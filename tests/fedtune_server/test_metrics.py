"""A run's numbers are in the JSON lines and in TensorBoard's event files, at the right step."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event as BoardEvent
from tensorboardX.proto.event_pb2 import SessionLog

from fedtune.errors import RunError
from fedtune.records import Event
from fedtune_server.metrics import MetricsWriter

REPORTED = Event(
    "device_reported",
    {
        "round": 2,
        "device": "site a/b",
        "loss_before": 3.0,
        "train_loss": 2.5,
        "samples": 80,
        "tokens": 900,
        "download_bytes": 1000,
        "upload_bytes": 500,
        "seconds": 1.5,
        "peak_bytes": None,
    },
)
FINISHED = Event(
    "round_finished",
    {
        "round": 2,
        "reported": 1,
        "refused": 0,
        "held_out_loss": 3.0,
        "train_loss": 2.5,
        "seconds": 2.0,
        "download_bytes": 1000,
        "upload_bytes": 500,
        "dropped_energy": 0.0,
    },
)
EVALUATED = Event(
    "evaluated",
    {"round": 2, "held_out_loss": 2.0, "devices": {"site a/b": 2.0}, "accuracy": None},
)


def _events(file: Path) -> list[BoardEvent]:
    found, data, position = [], file.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        found.append(BoardEvent.FromString(data[position + 12 : position + 12 + length]))
        position += 12 + length + 4
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar in a folder's event files; a record is length, crc, event, crc."""
    found = {}
    for file in folder.iterdir():
        for event in _events(file):
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def write(folder: Path, *events: Event) -> None:
    with MetricsWriter(folder / "metrics.jsonl", folder / "tensorboard") as writer:
        for event in events:
            writer(event)


def lines(folder: Path) -> list[dict[str, object]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_there_is_one_line_per_device_and_round_and_one_per_round(tmp_path: Path) -> None:
    write(tmp_path, Event("round_started", {"round": 2}), REPORTED, FINISHED, EVALUATED)
    assert [line["kind"] for line in lines(tmp_path)] == [
        "device_reported",
        "round_finished",
        "evaluated",
    ]
    assert lines(tmp_path)[0]["train_loss"] == 2.5
    assert lines(tmp_path)[0]["peak_bytes"] is None


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    write(tmp_path, REPORTED, FINISHED, EVALUATED)
    found = scalars(tmp_path / "tensorboard")
    assert found["loss/train", 2] == 2.5
    assert found["loss/train/site_a_b", 2] == 2.5
    assert found["bytes/down", 2] == 1000
    assert found["bytes/up", 2] == 500
    assert found["seconds/round", 2] == 2.0
    assert not any("peak" in tag for tag, _ in found)


def test_held_out_loss_stands_at_the_rounds_that_the_adapter_has_seen(tmp_path: Path) -> None:
    write(tmp_path, FINISHED, EVALUATED)
    found = scalars(tmp_path / "tensorboard")
    assert found["loss/held_out", 1] == 3.0
    assert found["loss/held_out", 2] == 2.0


def test_numbers_that_were_not_measured_leave_no_point(tmp_path: Path) -> None:
    write(tmp_path, Event("round_finished", {**FINISHED.fields, "held_out_loss": None}))
    assert not any(tag == "loss/held_out" for tag, _ in scalars(tmp_path / "tensorboard"))


def test_files_are_continued_and_a_torn_line_is_removed(tmp_path: Path) -> None:
    write(tmp_path, REPORTED)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind":"rou')
    write(tmp_path, FINISHED)
    assert [line["kind"] for line in lines(tmp_path)] == ["device_reported", "round_finished"]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, REPORTED, FINISHED)
    assert capfd.readouterr() == ("", "")


def test_a_run_that_goes_on_has_each_round_once(tmp_path: Path) -> None:
    def numbers(round: int, loss: float) -> Event:
        return Event("round_finished", {**FINISHED.fields, "round": round, "train_loss": loss})

    path, board = tmp_path / "metrics.jsonl", tmp_path / "board"
    with MetricsWriter(path, board) as writer:
        for round in (1, 2, 3):
            writer(numbers(round, 9.0))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind":"round_fin')  # killed
    with MetricsWriter(path, board, after=1) as writer:
        writer(numbers(2, 5.0))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["round"], line["train_loss"]) for line in lines] == [(1, 9.0), (2, 5.0)]
    files = sorted(board.iterdir())
    assert len(files) == 2
    first = _events(files[1])[:3]
    assert [event.file_version for event in first] == ["brain.Event:2", "brain.Event:2", ""]
    assert (first[2].session_log.status, first[2].step) == (SessionLog.START, 2)


def test_curves_end_on_a_full_disk_and_the_numbers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None: ...

    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board") as writer:
        writer._curves.close()
        monkeypatch.setattr(writer._curves, "_file", Full())
        for _ in range(30):
            writer(FINISHED)
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 30


def test_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None: ...

    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board") as writer:
        writer._file.close()
        monkeypatch.setattr(writer, "_file", Full())
        with pytest.raises(RunError, match=r"metrics.jsonl cannot be written \(No space left"):
            writer(FINISHED)
