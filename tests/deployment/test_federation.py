"""A coordinator and three sites as an operator starts them, and what must not change their result.

One federation serves all tests, this file's in their order: to start one takes most of the time.
"""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.operator import OperatorFile
from fedtune.wire.checkpoint import latest_checkpoint
from fedtune.wire.ledger_chain import verify_ledger
from tests.deployment.federated import ROUND_S, SITES, deployed, result

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]


def test_real_sites_come_to_the_result_of_a_simulation(
    federation: Any, expected: tuple[Path, Mapping[str, Any]]
) -> None:
    name = federation.hand_in(deployed(expected, "plain"))
    ended = federation.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 3), ended
    assert result(federation.run_folder(name)) == result(expected[0])
    verify_ledger(federation.run_folder(name) / "ledger.jsonl")


def test_a_site_and_the_coordinator_killed_amid_rounds_change_nothing(
    federation: Any, expected: tuple[Path, Mapping[str, Any]]
) -> None:
    name = federation.hand_in(deployed(expected, "befallen"))
    killed = []
    federation.wait_for_event(name, "round_started", lambda event: event["round"] == 1, 2 * ROUND_S)
    killed += federation.sites["north"].tree()
    federation.sites["north"].kill()
    federation.start_site("north", wait=False)
    federation.wait_for_event(name, "round_started", lambda event: event["round"] == 2, 2 * ROUND_S)
    killed += federation.server.tree()
    federation.server.kill()
    federation.start_server()
    ended = federation.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 3), ended
    assert result(federation.run_folder(name)) == result(expected[0])
    assert federation.events(name, "run_resumed")
    _, alive = psutil.wait_procs(killed, timeout=0)
    assert alive == []


def test_a_stop_reaches_the_devices_and_a_resumed_run_comes_to_the_same(
    federation: Any, expected: tuple[Path, Mapping[str, Any]]
) -> None:
    name = federation.hand_in(deployed(expected, "stopped"))
    federation.wait_for_event(
        name, "checkpoint_saved", lambda event: event["round"] == 1, 2 * ROUND_S
    )
    federation.fedtune("stop", name)
    ended = federation.wait_until_ended(name, ROUND_S)
    assert ended["state"] == "stopped", ended
    federation.fedtune("resume", name)
    ended = federation.wait_until_ended(name, 4 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 3), ended
    assert result(federation.run_folder(name)) == result(expected[0])


def test_a_site_pulls_what_its_run_has_made(federation: Any) -> None:
    home, there = federation.site_home("north"), federation.run_folder("plain")
    target = federation.folder / "pulled"
    federation.fedtune("client", "pull", "plain", "--dir", str(home), "--to", str(target))
    newest = latest_checkpoint(there / "checkpoints")
    assert newest is not None
    assert (target / "checkpoints" / newest.name).read_bytes() == newest.read_bytes()


def test_the_dashboard_and_prometheus_see_the_run_and_its_sites(federation: Any) -> None:
    home = CoordinatorHome(federation.home)
    token = OperatorFile.read(home.operator_file).token
    address = f"https://127.0.0.1:{federation.dashboard_port}"
    trust = ssl.create_default_context(cafile=str(home.ca_certificate))
    with httpx.Client(verify=trust, base_url=address, timeout=30) as client:
        found = client.post("/login", data={"token": token}, headers={"origin": address})
        assert found.status_code == 303
        with client.stream("GET", "/events?run=plain") as stream:
            shown = next(line for line in stream.iter_lines() if line.startswith("data: "))
        parts = json.loads(shown.removeprefix("data: "))["parts"]
        told = client.get("/metrics", headers={"authorization": f"Bearer {token}"}).text
    assert (parts["head"]["name"], parts["head"]["state"]) == ("plain", "finished")
    assert parts["fleet"]["order"] == sorted(SITES)
    for site in SITES:
        assert parts[f"site/{site}"]["online"], site
        assert parts[f"site/{site}"]["plan"].startswith("fp32, rank"), site
        assert f'fedtune_site_online{{site="{site}"}} 1.0' in told
    beside = httpx.get(f"http://127.0.0.1:{federation.health_port}/metrics", timeout=30).text
    assert 'fedtune_run_round{run="' in beside
    samples = [line.rsplit(" ", 1)[0] for line in beside.splitlines() if line[:1] not in "#"]
    assert len(samples) == len(set(samples))


def test_a_revoked_site_is_told_and_its_processes_end(federation: Any) -> None:
    """Last but one: the site does not come back."""
    federation.fedtune("server", "revoke", "south", "--dir", str(federation.home))
    south = federation.sites.pop("south")
    assert south.wait(ROUND_S) != 0
    assert "revoked" in (federation.folder / "south.out").read_text(encoding="utf-8")


def test_everything_ends_in_time_and_leaves_nothing(federation: Any) -> None:
    assert federation.stop_all() < 5.0
    assert federation.other_hosts() == []
