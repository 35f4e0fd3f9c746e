"""A coordinator and three sites as an operator starts them, and what must not change their result.

One federation serves all tests of this file, in their order: to start one takes most of the time.
"""

from __future__ import annotations

import importlib.util
import json
import ssl
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from fedtune.cli.simulate import simulate_config
from fedtune.config import parse_run_config
from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.operator import OperatorFile
from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint
from fedtune.wire.ledger_chain import verify_ledger

SITES = ("east", "north", "south")
ROUND_S = 90.0
"""Longest that a round may take on a machine that does other work, too."""

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]


def real_sites() -> ModuleType:
    """The harness, which benchmarks share."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "real_sites" / "__init__.py"
    spec = importlib.util.spec_from_file_location("real_sites", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each site's own rows."""
    folder, words = tmp_path_factory.mktemp("rows"), ("red", "green", "blue", "white")
    files = {}
    for at, site in enumerate(SITES):
        lines = [
            json.dumps({"prompt": f"{words[i % 4]} {words[(i + at) % 4]}", "response": words[at]})
            for i in range(24 + 8 * at)
        ]
        files[site] = folder / f"{site}.jsonl"
        files[site].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> Iterator[Any]:
    with real_sites().federation(
        tmp_path_factory.mktemp("federation"), tiny_llama, rows, "--dashboard"
    ) as started:
        yield started


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, rows: Mapping[str, Path]
) -> tuple[Path, Mapping[str, object]]:
    """The same run in a simulation: its folder, and its settings."""
    folder = tmp_path_factory.mktemp("simulated")
    tree: dict[str, Any] = {
        "run": {"name": "undisturbed", "rounds": 3, "minimum_devices": 3},
        "model": {"path": str(tiny_llama)},
        "data": {"sites": {site: str(path) for site, path in rows.items()}, "max_tokens": 40},
        "fleet": {"site": {"count": 3, "memory": "64 MB", "formats": ["fp32"]}},
        "lora": {"rank_max": 4, "rank_cap": 8},
        "train": {"local_steps": 2, "batch_size": 4, "compute": "fp32", "keep_optimizer": True},
        "wire": {"up": "int8"},
        "simulation": {"threads": 1},
        "outputs": {"folder": str(folder / "run"), "exports": []},
        "deployment": {"sites": list(SITES), "deadline_s": 120},
    }
    simulate_config(parse_run_config(tree, "test"), watch=lambda event: None)
    return folder / "run", tree


def deployed(expected: tuple[Path, Mapping[str, Any]], name: str, **run: object) -> dict[str, Any]:
    """The simulated run's settings for real sites, with its plan."""
    simulated, tree = expected
    return {
        **{key: value for key, value in tree.items() if key not in ("outputs", "simulation")},
        "run": {**tree["run"], "name": name, **run},
        "data": {"max_tokens": 40},
        "plan": {"file": str(simulated / "plan.json")},
        "outputs": {"exports": []},
    }


def result(folder: Path) -> bytes:
    """The adapter that a run ended with, as bytes."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    adapter = read_checkpoint(newest).adapter
    return b"".join(
        array.tobytes()
        for _, matrix in sorted(adapter.matrices.items())
        for array in (matrix.u, matrix.sigma, matrix.v)
    )


def test_real_sites_come_to_the_result_of_a_simulation(
    federation: Any, expected: tuple[Path, Mapping[str, Any]]
) -> None:
    name = federation.hand_in(deployed(expected, "plain"))
    ended = federation.wait_until_ended(name, 5 * ROUND_S)
    assert (ended["state"], ended["round"]) == ("finished", 3), ended
    assert result(federation.run_folder(name)) == result(expected[0])
    verify_ledger(federation.run_folder(name) / "ledger.jsonl")


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
