"""What a node keeps of its link."""

from __future__ import annotations

import json
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

from fedtune.deploy.exit_codes import EXIT_CONFIG, EXIT_RESTART
from fedtune_client.executor_secret import executor_secret
from fedtune_client.link_state import NAME, LinkState, read_link_state
from fedtune_client.node import REFUSAL_HEADER, SESSION_HEADER, Watch


def at(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)


def test_bytes_are_counted_and_large_exchanges_measure_the_rate(tmp_path: Path) -> None:
    clock = [1000.0]
    link = LinkState(tmp_path, lambda: clock[0])
    link.exchanged(100, 50, 0.001)
    link.exchanged(10, 5_000_000, 5.0)
    clock[0] += 10
    link.exchanged(1_000_000, 10, 4.0)
    found = json.loads((tmp_path / NAME).read_text("utf-8"))
    assert found["bytes_up"] == 1_000_110
    assert found["bytes_down"] == 5_000_060
    assert (found["down_bytes_per_s"], found["up_bytes_per_s"]) == (1e6, 250_000.0)
    assert read_link_state(tmp_path) == found


def test_counts_go_on_after_a_restart_and_nonsense_counts_nothing(tmp_path: Path) -> None:
    LinkState(tmp_path).exchanged(7, 8, 0.1)
    again = LinkState(tmp_path)
    assert again.figures["bytes_up"] == 7
    (tmp_path / NAME).write_text('["no"]', encoding="utf-8")
    assert read_link_state(tmp_path)["bytes_up"] == 0


def test_it_is_not_written_for_every_request(tmp_path: Path) -> None:
    clock = [1000.0]
    link = LinkState(tmp_path, lambda: clock[0])
    link.exchanged(1, 1, 0.1)
    clock[0] += 1
    link.exchanged(1, 1, 0.1)
    assert read_link_state(tmp_path)["bytes_up"] == 1
    clock[0] += 2
    link.exchanged(1, 1, 0.1)
    assert read_link_state(tmp_path)["bytes_up"] == 3
    clock[0] -= 3600  # the machine's clock was corrected
    link.exchanged(1, 1, 0.1)
    assert read_link_state(tmp_path)["bytes_up"] == 4


@pytest.mark.parametrize(("ours", "offset"), [(5000.0, 0.0), (1400.0, 3600.5), (8600.0, -3599.5)])
def test_a_clock_that_is_off_by_much_is_followed(
    tmp_path: Path, ours: float, offset: float
) -> None:
    link = LinkState(tmp_path, lambda: ours)
    link.coordinator_says(at(5000), 0.0)
    assert link.clock_offset_s == offset
    assert read_link_state(tmp_path)["clock_offset_s"] == offset
    link.coordinator_says(at(5001), 0.0)  # a second is the step of the header
    assert link.clock_offset_s == offset


def test_a_clock_that_was_put_right_is_trusted_again(tmp_path: Path) -> None:
    clock = [1400.0]
    link = LinkState(tmp_path, lambda: clock[0])
    link.coordinator_says(at(5000), 0.0)
    clock[0] = 5002.0
    link.coordinator_says(at(5002), 0.0)
    assert link.clock_offset_s == 0.0


def test_slow_and_malformed_answers_tell_no_time(tmp_path: Path) -> None:
    link = LinkState(tmp_path, lambda: 0.0)
    link.coordinator_says(at(5000), 20.0)
    link.coordinator_says("tomorrow", 0.0)
    link.coordinator_says("", 0.0)
    assert link.clock_offset_s == 0.0


def watched(tmp_path: Path, status: int, kind: str = "") -> tuple[list[int], httpx.Request]:
    ends: list[int] = []
    request = httpx.Request("POST", "https://link/", content=b"abc")
    headers = {REFUSAL_HEADER: kind} if kind else {}
    answer = httpx.Response(status, headers=headers, text="words", request=request)
    Watch(LinkState(tmp_path), ends.append)(request, lambda: answer)
    return ends, request


@pytest.mark.parametrize(
    ("status", "kind", "ends"),
    [
        (200, "", []),
        (500, "", []),
        (429, "rate", []),
        (503, "signature", []),
        (403, "", []),  # Flower's own: the run has ended
        (403, "site", [EXIT_CONFIG]),
        (403, "superseded", [EXIT_CONFIG]),
        (401, "", [EXIT_RESTART]),
    ],
)
def test_a_node_ends_where_asking_again_is_of_no_use(
    tmp_path: Path, status: int, kind: str, ends: list[int]
) -> None:
    found, request = watched(tmp_path, status, kind)
    assert found == ends
    assert len(request.headers[SESSION_HEADER]) == 16


def test_both_processes_of_a_site_know_one_secret(tmp_path: Path) -> None:
    secret = executor_secret(tmp_path / "state")
    assert executor_secret(tmp_path / "state") == secret
    assert len(secret) == 64
    files = list((tmp_path / "state").iterdir())
    assert [file.name for file in files] == ["executor.secret"]
    assert files[0].stat().st_mode & 0o077 == 0
