from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.home_run import HomeRun
from fedtune.errors import DeploymentError
from fedtune_client import start as module
from fedtune_client.start import start


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "client.toml").write_text(
        '[site]\nname = "north"\nserver = "h:9400"\nservice = "h:9401"\n'
    )
    for name in ("ca.crt", "node.key"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[HomeRun, tuple[str, ...]]]:
    seen: list[tuple[HomeRun, tuple[str, ...]]] = []

    def run_home(run: HomeRun, view: Any, warnings: tuple[str, ...]) -> int:
        seen.append((run, warnings))
        return 0

    monkeypatch.setattr(module, "run_home", run_home)
    return seen


def test_a_site_is_a_node_and_an_executor(
    home: Path, run: list[tuple[HomeRun, tuple[str, ...]]]
) -> None:
    assert start(home) == 0
    found, warnings = run[0]
    assert [child.command for child in found.children] == [
        (sys.executable, "-P", "-m", "fedtune_client.node", str(home)),
        (sys.executable, "-P", "-m", "fedtune_client.executor", str(home)),
    ]
    assert [child.after for child in found.children] == [(), ()]
    assert [child.essential for child in found.children] == [True, False]
    assert [child.answers is not None for child in found.children] == [True, False]
    assert found.identity.name == "north"
    assert found.identity.metric_files == (home / "state" / "metrics.prom",)
    assert found.ports == {"node_port": ("127.0.0.1", 9411)}
    assert found.health_port == 9410
    assert warnings == ()


def test_insecure_needs_no_certificate_and_is_warned_of(
    home: Path, run: list[tuple[HomeRun, tuple[str, ...]]]
) -> None:
    (home / "ca.crt").unlink()
    with pytest.raises(DeploymentError, match=r"ca.crt is not there; .* fedtune client join"):
        start(home)
    start(home, insecure=True)
    found, warnings = run[0]
    assert all(child.command[-1] == "--insecure" for child in found.children)
    assert "nothing is encrypted" in warnings[0]


def test_a_home_that_nobody_joined_from_is_refused(home: Path) -> None:
    with pytest.raises(DeploymentError, match=r"nowhere/client.toml cannot be read .* client join"):
        start(home / "nowhere")
    (home / "node.key").unlink()
    with pytest.raises(DeploymentError, match=r"node.key is not there"):
        start(home)
