"""A simulated run on this machine's clock, whose classes are not what their sections say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedtune.wire.ledger_chain import verify_ledger
from fedtune_client.clock import StepClock

Tree = dict[str, dict[str, Any]]
Play = Callable[[Tree], Any]


@pytest.fixture
def optimistic(tree: Tree) -> Tree:
    """Classes that promise steps of two milliseconds, four of which are a small part of a round."""
    tree["run"]["rounds"] = 4
    tree["plan"] = {"round_seconds": 0.2, "steps": "equal"}
    tree["train"] |= {"local_steps": 4, "evaluate_every": 0}
    for section in tree["fleet"].values():
        section |= {"flops_per_s": 4e10, "memory_bandwidth": "100 GB", "link": "1 GB"}
    return tree


def test_on_a_virtual_clock_no_device_measures_and_none_is_planned_anew(
    optimistic: Tree, play: Play
) -> None:
    played = play(optimistic)
    assert played.all("replanned") == []
    for report in played.all("device_reported"):
        assert report["step_seconds"] is None
        assert report["free_bytes"] is None
        assert report["seconds"] > 0


def test_on_this_machines_clock_each_device_is_planned_anew_with_one_line(
    optimistic: Tree, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepClock, "step_seconds", 0.08)  # two of them fit a round
    optimistic["simulation"]["clock"] = "measured"
    played = play(optimistic)
    replanned = played.all("replanned")
    assert [event["device"] for event in replanned] == ["east", "north", "south", "west"]
    for event in replanned:
        assert (event["round"], event["cause"]) == (2, "time")
        assert event["measured_step_seconds"] > 1.25 * event["planned_step_seconds"]
        before, after = event["changed"]["local_steps"]
        assert before == 4
        assert 1 <= after <= 3  # two whole ones fit, or three that stop at a higher layer
        reports = [r for r in played.all("device_reported") if r["device"] == event["device"]]
        assert [r["samples"] for r in reports] == [4 * 8] * 2 + [after * 8] * 2
        assert all(r["step_seconds"] > 0 and r["free_bytes"] > 0 for r in reports)
    lines = verify_ledger(played.folder / "ledger.jsonl")
    written = [line for line in lines if line["kind"] == "replanned"]
    assert [line["changed"] for line in written] == [
        json.loads(json.dumps(event["changed"])) for event in replanned
    ]
