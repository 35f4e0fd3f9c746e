from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.certificates import make_authority, make_server_certificate
from fedtune.deploy.home_run import HomeRun
from fedtune.errors import DeploymentError
from fedtune_server import start as module
from fedtune_server.start import start
from tests.processes import free_ports


@pytest.fixture
def home(tmp_path: Path) -> Path:
    port, service, dashboard, health = free_ports(4)
    (tmp_path / "pki").mkdir()
    pair = make_server_certificate(authority := make_authority("h"), "h")
    (tmp_path / "pki" / "ca.crt").write_bytes(authority.certificate)
    (tmp_path / "pki" / "server.crt").write_bytes(pair.certificate)
    (tmp_path / "pki" / "server.key").write_bytes(pair.key)
    (tmp_path / "server.toml").write_text(
        f'host = "h"\nbind = "127.0.0.1"\nport = {port}\nservice_port = {service}\n'
        f"dashboard_port = {dashboard}\nhealth_port = {health}\n"
    )
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[HomeRun, Any, tuple[str, ...]]]:
    seen: list[tuple[HomeRun, Any, tuple[str, ...]]] = []

    def run_home(run: HomeRun, view: Any, warnings: tuple[str, ...]) -> int:
        seen.append((run, view, warnings))
        return 0

    monkeypatch.setattr(module, "run_home", run_home)
    return seen


def test_a_coordinator_is_a_link_and_what_waits_for_it(
    home: Path, run: list[tuple[HomeRun, Any, tuple[str, ...]]]
) -> None:
    assert start(home, dashboard=True) == 0
    found, _, warnings = run[0]
    children = {child.name: child for child in found.children}
    assert list(children) == ["link", "runner", "desk"]
    base = (sys.executable, "-P", "-m")
    assert children["link"].command == (*base, "fedtune_server.link", str(home))
    assert children["runner"].command == (*base, "fedtune_server.runner", str(home))
    assert children["desk"].command == (*base, "fedtune_server.desk", str(home), "--dashboard")
    assert [child.after for child in found.children] == [(), ("link",), ("link",)]
    assert children["link"].essential
    assert children["link"].environment["FLWR_HOME"] == str(home / "flower")
    assert children["link"].environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert "FEDTUNE_INSECURE" not in children["link"].environment
    assert set(found.ports) == {"port", "service_port", "dashboard_port"}
    assert warnings == ()


def test_insecure_is_passed_on_and_warned_of(
    home: Path, run: list[tuple[HomeRun, Any, tuple[str, ...]]]
) -> None:
    (home / "pki" / "server.crt").unlink()
    start(home, insecure=True)
    found, _, warnings = run[0]
    assert all(child.command[-1] == "--insecure" for child in found.children)
    assert all(child.environment["FEDTUNE_INSECURE"] == "1" for child in found.children)
    assert "--insecure: nothing is encrypted" in warnings[0]
    assert set(found.ports) == {"port", "service_port"}


def test_a_home_that_is_not_there_or_not_whole_is_refused(home: Path) -> None:
    with pytest.raises(DeploymentError, match=r"nowhere/server.toml cannot be read .* server init"):
        start(home / "nowhere")
    (home / "pki" / "server.key").unlink()
    with pytest.raises(DeploymentError, match=r"server.key is not there; .* fedtune server init"):
        start(home)


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.deploy import home_run

    monkeypatch.setattr(
        home_run, "check_ports", lambda wanted, check=home_run.check_ports: check(wanted, wait_s=0)
    )
    settings = (home / "server.toml").read_text()
    port = int(settings.split("service_port = ")[1].split()[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(DeploymentError, match=f"service_port = {port}: the port is taken"):
            start(home)
    assert not (home / "logs").exists()


def test_a_certificate_of_another_key_is_refused(home: Path) -> None:
    other = make_server_certificate(make_authority("h"), "h")
    (home / "pki" / "server.key").write_bytes(other.key)
    with pytest.raises(DeploymentError, match=r"is not of the key .* fedtune server rotate"):
        start(home)
