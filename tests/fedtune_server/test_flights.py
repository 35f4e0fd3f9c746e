"""Large replies are fetched a few at a time, and none is forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from fedtune_server import flights as module
from fedtune_server.flights import Flight, Flights
from fedtune_server.starts import Sent


class Reply:
    """As far as it is looked at before it is read."""

    def __init__(self, message_id: str) -> None:
        self.metadata = type("Metadata", (), {"reply_to_message_id": message_id, "src_node_id": 1})
        self.error = type("Error", (), {"reason": "no", "code": 2})

    def has_error(self) -> bool:
        return True


class Grid:
    def __init__(self) -> None:
        self.there: set[str] = set()
        self.asked: list[list[str]] = []

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        self.asked.append(list(ids))
        found = [name for name in self.asked[-1] if name in self.there]
        self.there -= set(found)
        return [Reply(name) for name in found]


def opened(sizes: dict[str, int]) -> Flights:
    flights = Flights()
    for name, size in sizes.items():
        sent: Any = Sent(None, bytes(size))  # type: ignore[arg-type]
        plan: Any = None
        flights._open[name] = Flight(name, 1, 1, plan, sent, flights.clock.now(), 1e6)
    return flights


def test_replies_are_fetched_in_groups_of_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    flights, grid = opened({"a": 60, "b": 40, "c": 10, "d": 300, "e": 1}), Grid()
    assert flights.next(grid, (), pull=True) is None  # type: ignore[arg-type]
    assert grid.asked == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_group_is_judged_before_the_next_one_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    flights, grid = opened({"a": 60, "b": 60, "c": 60}), Grid()
    grid.there = {"b", "c"}
    found = []
    while (landed := flights.next(grid, (), pull=True)) is not None:  # type: ignore[arg-type]
        found.append((landed[0].device, len(grid.asked)))
    assert found == [("b", 2), ("c", 4)]


def test_small_replies_are_fetched_at_once() -> None:
    flights, grid = opened(dict.fromkeys(map(str, range(200)), 1000)), Grid()
    flights.next(grid, (), pull=True)  # type: ignore[arg-type]
    assert [len(ids) for ids in grid.asked] == [200]
