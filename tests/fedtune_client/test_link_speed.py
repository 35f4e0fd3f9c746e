"""The speed of the link, before training has shown it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from fedtune_client.link_speed import LinkSpeed, known_link, measure_link, probe_link


class Line:
    """A line of a known speed, and its clock."""

    def __init__(self, down: float, up: float) -> None:
        self.down, self.up, self.time = down, up, 0.0
        self.sizes: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.time

    def answer(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/fedtune/v1/echo"
        assert request.headers["authorization"] == "Bearer secret"
        if request.method == "GET":
            size = int(request.url.params["bytes"])
            self.time += size / self.down
            self.sizes.append(("down", size))
            return httpx.Response(200, content=bytes(size))
        size = len(request.content)
        self.time += size / self.up
        self.sizes.append(("up", size))
        return httpx.Response(200)

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url="https://c:9400",
            headers={"authorization": "Bearer secret"},
            transport=httpx.MockTransport(self.answer),
        )


@pytest.mark.parametrize(("down", "up"), [(1e5, 2e4), (1e6, 3e6), (1e9, 1e9)])
def test_both_ways_are_measured(down: float, up: float) -> None:
    line = Line(down, up)
    found = measure_link(line.client, clock=line.clock)
    assert found.down_bytes_per_s == pytest.approx(down)
    assert found.up_bytes_per_s == pytest.approx(up)
    assert line.time < 4
    assert line.time > 0.5 or line.sizes[-1][1] > 2_000_000
    assert max(size for _, size in line.sizes) <= 4_000_000


def test_a_slow_line_is_not_held_for_long() -> None:
    line = Line(7e3, 7e3)  # a modem
    measure_link(line.client, clock=line.clock)
    assert line.time < 5


def test_a_probe_is_kept_and_what_transfers_showed_goes_first(tmp_path: Path) -> None:
    assert known_link(tmp_path) == LinkSpeed()
    probe_link(Line(1e6, 3e5).client, tmp_path)
    kept = known_link(tmp_path)
    assert 0 < kept.slower == min(kept.up_bytes_per_s, kept.down_bytes_per_s)
    shown = {"down_bytes_per_s": 5.0, "up_bytes_per_s": 0, "bytes_down": 1, "bytes_up": 1}
    (tmp_path / "link.json").write_text(json.dumps(shown))
    assert known_link(tmp_path) == LinkSpeed(5.0, kept.up_bytes_per_s)


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_coordinator_that_refuses_leaves_the_link_unknown(tmp_path: Path, status: int) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status))
    with httpx.Client(base_url="https://c", transport=transport) as client:
        assert probe_link(client, tmp_path) == LinkSpeed()
    assert not (tmp_path / "link_probe.json").exists()


def test_an_answer_of_another_size_is_no_measurement(tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=b"1"))
    with httpx.Client(base_url="https://c", transport=transport) as client:
        assert probe_link(client, tmp_path) == LinkSpeed()


def test_files_that_say_nonsense_are_no_speed(tmp_path: Path) -> None:
    for value in (True, -1, 1e300, "fast", None):
        (tmp_path / "link.json").write_text(json.dumps({"down_bytes_per_s": value}))
        assert known_link(tmp_path) == LinkSpeed()
