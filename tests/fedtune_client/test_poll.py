"""How often a node asks, by what its coordinator says."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune import flwr_compat
from fedtune_client.link_state import LinkState
from fedtune_client.node import (
    FLOWERS_POLL_S,
    LEAST_POLL_S,
    MOST_POLL_S,
    POLL_HEADER,
    Watch,
    wanted_poll_s,
)


def test_what_is_wanted_is_bounded() -> None:
    wanted = {text: wanted_poll_s(text, 7.0) for text in ("10.00", "0", "1e9", "nan", "soon", "")}
    assert wanted == {
        "10.00": 10.0, "0": LEAST_POLL_S, "1e9": MOST_POLL_S, "nan": 7.0, "soon": 7.0, "": 7.0
    }  # fmt: skip


def test_a_node_follows_the_answers(tmp_path: Path) -> None:
    watch = Watch(LinkState(tmp_path))
    assert watch.poll_s == FLOWERS_POLL_S == flwr_compat.POLL_S
    for headers, expected in (({POLL_HEADER: "1.50"}, 1.5), ({}, 1.5)):
        request = httpx.Request("POST", "https://link/v1/fleet/pull-messages")
        watch(request, lambda headers=headers: httpx.Response(200, headers=headers))
        assert watch.poll_s == expected


def test_flowers_loop_sleeps_by_the_name_that_is_replaced() -> None:
    loop: Any = importlib.import_module("flwr.supernode.start_client_internal")
    source = Path(loop.__file__).read_text(encoding="utf-8")
    assert "time.sleep(3)" in source
    assert "from time import" not in source


def test_the_loop_waits_as_long_as_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    paced = flwr_compat._PacedTime(lambda: 12.0)
    paced.sleep(3)
    paced.sleep(0.5)
    assert slept == [12.0, flwr_compat.REPLY_POLL_S]
    assert paced.monotonic() > 0
