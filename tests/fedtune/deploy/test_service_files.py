"""Service files: what systemd, Docker and compose make of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from shutil import which

import pytest

from fedtune.deploy.homes import ServerSettings
from fedtune.deploy.service_files import (
    ServiceKind,
    compose_file,
    coordinator_files,
    dockerfile,
    site_files,
    systemd_unit,
)
from fedtune.errors import DeploymentError

ALL = list(ServiceKind)
SETTINGS = ServerSettings(host="localhost")


@pytest.mark.skipif(which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("side", ["server", "client"])
def test_systemd_takes_the_unit_even_at_an_odd_path(tmp_path: Path, side: str) -> None:
    unit = tmp_path / f"fedtune-{side}.service"
    unit.write_text(systemd_unit(side, tmp_path / 'a %n b "c" $HOME'))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_back_the_command_that_was_meant(tmp_path: Path) -> None:
    """An option that systemd does not know is a complaint: the check above can fail."""
    unit = tmp_path / "fedtune-server.service"
    unit.write_text(systemd_unit("server", tmp_path).replace("NoNewPrivileges", "NoNewPrivilege"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "NoNewPrivilege" in done.stderr


def test_the_unit_is_hardened_and_restarts() -> None:
    text = systemd_unit("server", Path("/var/lib/fedtune"))
    for line in (
        "Type=notify", "Restart=always", "RestartPreventExitStatus=78", "WatchdogSec=60",
        "TimeoutStopSec=10", "NoNewPrivileges=yes", "ProtectSystem=strict", "User=fedtune",
        "ReadWritePaths=/var/lib/fedtune", "CapabilityBoundingSet=", "PrivateDevices=yes",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "-m fedtune server start /var/lib/fedtune" in text
    site = systemd_unit("client", Path("/var/lib/site"))
    assert "PrivateDevices=yes" not in site  # its GPU is one
    assert "-m fedtune client start /var/lib/site" in site


def test_signs_of_systemd_in_a_path_are_not_obeyed() -> None:
    text = systemd_unit("server", Path("/srv/50%/my $HOME"))
    assert 'ReadWritePaths="/srv/50%%/my $$HOME"' in text
    with pytest.raises(DeploymentError, match="without line breaks"):
        systemd_unit("server", Path("/srv/a\nExecStartPre=/bin/evil"))


def test_the_image_runs_as_nobody_special_and_looks_after_itself() -> None:
    lines = dockerfile("server", "", 9403).splitlines()
    steps = [line.split()[0] for line in lines if line and not line.startswith(("#", " "))]
    assert steps[0] == "FROM"
    assert steps.index("USER") < steps.index("ENTRYPOINT")
    assert "USER fedtune" in lines
    check = next(line for line in lines if line.startswith("HEALTHCHECK"))
    program = json.loads(check.partition("CMD ")[2])
    compile(program[2], "check", "exec")
    assert "127.0.0.1:9403/health" in program[2]
    entry = json.loads(lines[-1].removeprefix("ENTRYPOINT "))
    assert entry == ["fedtune", "server", "start", "/home/fedtune/home"]
    assert "'fedtune[train]==" in dockerfile("client", "[train]", 9410)


def outline(text: str) -> dict[str, object]:
    """The two levels of YAML that a compose file of ours has: mappings and lists of texts."""
    tree: dict[str, object] = {}
    service: dict[str, object] = {}
    items: list[str] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        assert "\t" not in line
        if bare.startswith("- "):
            assert indent == 6
            items.append(json.loads(bare[2:]))
            continue
        key, colon, value = bare.partition(":")
        assert colon
        if indent == 0:
            tree[key] = service
        elif indent == 2:
            tree["service"] = key
        else:
            assert indent == 4
            items = []
            service[key] = value.strip() or items
    return tree


def test_the_compose_file_holds_an_init_process_and_what_is_reached() -> None:
    tree = outline(compose_file("server", (9400, 9401), ()))
    service = tree["services"]
    assert isinstance(service, dict)
    assert tree["service"] == "server"
    assert service["init"] == "true"
    assert service["ports"] == ["9400:9400", "9401:9401"]
    assert service["volumes"] == ["../:/home/fedtune/home"]
    assert service["stop_grace_period"] == "10s"
    site = outline(compose_file("client", (), [Path("/data/rows.jsonl")]))["services"]
    assert isinstance(site, dict)
    assert "ports" not in site
    assert site["volumes"] == ["../:/home/fedtune/home", "/data/rows.jsonl:/data/rows.jsonl:ro"]


def test_only_what_is_asked_for_is_made() -> None:
    home = Path("/srv/home")
    assert coordinator_files(home, SETTINGS, []) == {}
    assert list(coordinator_files(home, SETTINGS, [ServiceKind.DOCKER])) == ["service/Dockerfile"]
    assert set(site_files(home, 9410, ALL)) == {
        "service/fedtune-client.service", "service/Dockerfile", "service/compose.yaml",
    }  # fmt: skip


def has_compose() -> bool:
    if which("docker") is None:
        return False
    found = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return found.returncode == 0


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
def test_docker_compose_takes_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    for name, text in coordinator_files(tmp_path, SETTINGS, ALL).items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["docker", "compose", "-f", str(folder / "compose.yaml"), "config", "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
