"""Real processes: a link, a runner, nodes and executors, over TLS on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.running import Deployment

pytestmark = pytest.mark.deployment


@pytest.fixture
def two_sites(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, sites=2)
    yield deployment
    deployment.close()


def test_messages_go_round_and_the_executor_stays_the_same_process(two_sites: Deployment) -> None:
    two_sites.plan(rounds=2, bytes=1_000_000)
    two_sites.start_all()
    answers = two_sites.result(two_sites.begin(), 90)
    first = sorted(text for turn, text in answers.items() if turn.startswith("0-"))
    second = sorted(text for turn, text in answers.items() if turn.startswith("1-"))
    assert [text.split()[0] for text in first] == ["site-0", "site-1"]
    assert first == second
    assert all(text.endswith(" 1000000") for text in first)


def test_a_device_says_why_it_refuses_and_a_run_that_is_not_ours_is_refused(
    two_sites: Deployment,
) -> None:
    two_sites.start_all()
    two_sites.plan(body="refuse")
    answers = two_sites.result(two_sites.begin(), 90)
    assert "this site rests at night" in answers["0-error"]
    two_sites.plan(body="raise")
    answers = two_sites.result(two_sites.begin(), 90)
    assert "ValueError" in answers["0-error"]
    assert "boo" in answers["0-error"]
    two_sites.plan()
    answers = two_sites.result(two_sites.begin({"other": "run"}), 90)
    assert "expected a run of fedtune" in answers["0-error"]
