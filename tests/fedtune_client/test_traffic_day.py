"""Bytes of a day, over restarts."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from fedtune_client.traffic_day import TrafficDay


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 27, 23, 50)

    def __call__(self) -> datetime:
        return self.now


def node_says(folder: Path, down: int, up: int) -> None:
    (folder / "link.json").write_text(json.dumps({"bytes_down": down, "bytes_up": up}))


def test_a_day_adds_up_over_restarts_of_node_and_executor(tmp_path: Path) -> None:
    clock = Clock()
    day = TrafficDay(tmp_path, clock)
    assert day.today().total == 0
    node_says(tmp_path, 100, 10)
    assert (day.today().down, day.today().up) == (100, 10)
    node_says(tmp_path, 30, 5)  # the node was started anew
    assert (day.today().down, day.today().up) == (130, 15)
    day = TrafficDay(tmp_path, clock)  # so was the executor
    node_says(tmp_path, 40, 5)
    assert (day.today().down, day.today().up) == (140, 15)


def test_midnight_begins_at_nothing(tmp_path: Path) -> None:
    clock = Clock()
    day = TrafficDay(tmp_path, clock)
    node_says(tmp_path, 100, 10)
    assert day.today().total == 110
    clock.now = datetime(2026, 11, 28, 0, 1)
    node_says(tmp_path, 103, 10)
    assert day.today().total == 3


def test_files_that_say_nothing_count_nothing(tmp_path: Path) -> None:
    (tmp_path / "traffic.json").write_text("[1, 2")
    day = TrafficDay(tmp_path, Clock())
    for text in ("", "[]", '{"bytes_down": "many", "bytes_up": -5}', "[" * 100_000):
        (tmp_path / "link.json").write_text(text)
        assert day.today().total == 0


def test_a_disk_that_is_full_does_not_stop_the_count(tmp_path: Path) -> None:
    day = TrafficDay(tmp_path / "file" / "state", Clock())
    (tmp_path / "file").write_text("not a folder")
    assert day.today().total == 0
