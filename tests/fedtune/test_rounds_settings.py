"""Settings of rounds that could not be played are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.config import parse_run_config
from fedtune.errors import ConfigError
from fedtune.settings import RunConfig

Tree = dict[str, dict[str, Any]]


def parse(**sections: Any) -> RunConfig:
    tree: Tree = {
        "model": {"path": "not/read/here"},
        "data": {"train": "not-read.jsonl"},
        "fleet": {"any": {"count": 4, "memory": "1 GB"}},
        "run": {"rounds": 5},
    }
    for name, values in sections.items():
        if name == "fleet":
            tree["fleet"]["any"] |= values
        else:
            tree.setdefault(name, {}).update(values)
    return parse_run_config(tree, "test")


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"rounds": {"close_count": 4}},
        {"rounds": {"close_count": 2}, "run": {"minimum_devices": 2}},
        {"rounds": {"mode": "async", "close_count": 2}},
        {"rounds": {"mode": "async", "close_fraction": 0.5}},
        {"aggregate": {"rule": "flora"}},
        {"simulation": {"delay": "pareto"}},
        {"fleet": {"rounds_max": 2}},
    ],
)
def test_rounds_that_can_be_played_pass(sections: Any) -> None:
    parse(**sections)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rounds": {"close_count": 5}}, r"rounds.close_count = 5: .* from .* = 1 to 4"),
        (
            {"rounds": {"close_count": 1}, "run": {"minimum_devices": 2}},
            r"rounds.close_count = 1: .* from run.minimum_devices = 2 to 4",
        ),
        (
            {"rounds": {"close_count": 3}, "run": {"devices_per_round": 2}},
            r"rounds.close_count = 3: .* to 2, the devices of a round",
        ),
        (
            {"rounds": {"mode": "async", "close_count": 2}, "aggregate": {"rule": "flexlora"}},
            "'async' goes with aggregate.rule = 'delta', found 'flexlora'",
        ),
        (
            {"rounds": {"mode": "async", "close_count": 2, "late": "refuse"}},
            "'async' goes with rounds.late = 'fold', found 'refuse'",
        ),
        ({"rounds": {"mode": "async"}}, "'async' needs rounds.close_count, or"),
        (
            {"simulation": {"delay": "lognormal", "clock": "measured"}},
            "simulation.delay = 'lognormal' goes with .* found 'inprocess' and 'measured'",
        ),
        (
            {"simulation": {"delay": "pareto", "backend": "ray"}},
            "simulation.delay = 'pareto' goes with .* found 'ray' and 'virtual'",
        ),
        (
            {"fleet": {"rounds_max": 1}},
            r"fleet.\*.rounds_max lets devices take part 4 times, expected at least 5",
        ),
    ],
)
def test_rounds_that_cannot_be_played_are_refused(sections: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(**sections)
