"""A coordinator's home: whole or not at all, private, and the same wherever it is copied."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from fedtune.deploy import coordinator_home
from fedtune.deploy.certificates import days_left, make_node_key, read_certificate, read_pair
from fedtune.deploy.coordinator_home import (
    make_coordinator,
    rotate_authority,
    rotate_certificate,
    rotate_token,
)
from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.deploy.operator import OperatorFile
from fedtune.deploy.service_files import ServiceKind
from fedtune.errors import DeploymentError, RunError
from fedtune_server.registry import Registry


def test_a_new_home_is_whole_and_private(tmp_path: Path) -> None:
    made = make_coordinator(tmp_path / "c", "fed.example.org", 9500)
    home = made.home
    settings = home.settings()
    assert (settings.host, settings.port, settings.service_port) == ("fed.example.org", 9500, 9501)
    assert (settings.dashboard_port, settings.health_port) == (9502, 9503)
    operator = OperatorFile.read(home.operator_file)
    assert (operator.server, operator.service) == ("fed.example.org:9500", "fed.example.org:9501")
    assert len(operator.token) == 43
    assert read_certificate(operator.ca.encode(), "ca") == read_certificate(
        home.ca_certificate.read_bytes(), "ca"
    )
    read_pair(home.certificate, home.key)
    assert 823 < (days_left(home.certificate) or 0) < 825
    assert Registry(home.registry).sites() == {}
    for folder in (home.queue, home.runs, home.flower, home.logs):
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    if sys.platform != "win32":
        public = {home.ca_certificate, home.certificate}
        for path in home.path.rglob("*"):
            expected = 0o700 if path.is_dir() else 0o644 if path in public else 0o600
            assert path.stat().st_mode & 0o777 == expected, path
        assert home.path.stat().st_mode & 0o777 == 0o700


def test_every_setting_stands_in_the_file_with_its_meaning(tmp_path: Path) -> None:
    text = make_coordinator(tmp_path / "c", "10.0.0.5").home.settings_file.read_text()
    lines = text.splitlines()
    keys = {*ServerSettings.model_fields} - {"limits"}
    tree = tomllib.loads(text)
    assert keys <= tree.keys()
    for key in (*keys, *tree["limits"]):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key} = "))
        assert lines[at - 1].startswith("# ")
    defaults = ServerSettings(host="10.0.0.5")
    assert ServerSettings.model_validate(tree) == defaults


def test_nothing_is_overwritten_and_what_is_there_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    make_coordinator(folder, "localhost")  # an empty one is taken
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DeploymentError, match=r"holds flower, logs, operator.toml and 5 more"):
        make_coordinator(folder, "localhost")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeploymentError, match=r"expected a folder at .*, found a file"):
        make_coordinator(tmp_path / "file", "localhost")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("call", range(7))
def test_a_failed_init_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The disk is full at the n-th file."""
    calls = 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); free some"):
        make_coordinator(tmp_path / "c", "localhost")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_filled_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    inode = folder.stat().st_ino
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    make_coordinator(folder, "localhost").home.settings()
    assert folder.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("host", ["", "a b", "http://x", "-x.org", "x:9400", "a/b", "x" * 64])
def test_a_wrong_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(DeploymentError, match="expected a host's name or address"):
        make_coordinator(tmp_path / "c", host)
    with pytest.raises(DeploymentError, match="expected a port in 1 to 65532, found 65533"):
        make_coordinator(tmp_path / "c", "localhost", 65_533)
    assert list(tmp_path.iterdir()) == []


def test_a_copied_home_is_the_same_coordinator(tmp_path: Path) -> None:
    """Backup and restore: nothing in it names where it lies."""
    first = make_coordinator(tmp_path / "c", "localhost").home
    registry = Registry(first.registry)
    key = make_node_key().public
    token = registry.enrol(registry.invite("north").secret, key).token
    code = registry.invite("south")
    shutil.copytree(first.path, tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path
    shutil.rmtree(first.path)
    home = CoordinatorHome(tmp_path / "elsewhere")
    assert home.settings().host == "localhost"
    assert OperatorFile.read(home.operator_file).server == "localhost:9400"
    read_pair(home.certificate, home.key)
    copied = Registry(home.registry)
    known = copied.by_token(token)
    assert known is not None
    assert known.name == "north"
    assert copied.enrol(code.secret, make_node_key().public).name == "south"


def test_rotating_the_certificate_changes_nothing_for_sites(tmp_path: Path) -> None:
    home = make_coordinator(tmp_path / "c", "localhost").home
    authority, operator = home.ca_certificate.read_bytes(), home.operator_file.read_bytes()
    old = home.certificate.read_bytes()
    assert 823 < rotate_certificate(home) < 825
    assert home.certificate.read_bytes() != old
    read_pair(home.certificate, home.key)
    issuer = read_certificate(authority, "ca")
    read_certificate(home.certificate.read_bytes(), "it").verify_directly_issued_by(issuer)
    assert home.ca_certificate.read_bytes() == authority
    assert home.operator_file.read_bytes() == operator


def test_a_rotation_cut_in_the_middle_is_said_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_coordinator(tmp_path / "c", "localhost").home

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(coordinator_home, "write_with_mode", cut)  # the key is written, this is not
        with pytest.raises(KeyboardInterrupt):
            rotate_certificate(home)
    with pytest.raises(DeploymentError, match="make new ones with: fedtune server rotate"):
        read_pair(home.certificate, home.key)
    rotate_certificate(home)
    read_pair(home.certificate, home.key)


def test_rotating_the_token_voids_the_old(tmp_path: Path) -> None:
    home = make_coordinator(tmp_path / "c", "localhost").home
    old = OperatorFile.read(home.operator_file)
    rotate_token(home)
    new = OperatorFile.read(home.operator_file)
    assert new.token != old.token
    assert (new.server, new.service) == (old.server, old.service)
    assert new.ca.strip() == old.ca.strip()


def test_a_new_authority_keeps_the_old_beside_it_and_names_itself_in_codes(tmp_path: Path) -> None:
    home = make_coordinator(tmp_path / "c", "localhost").home
    registry = Registry(home.registry)
    before, old = registry.invite("north"), home.ca_certificate.read_bytes()
    kept = rotate_authority(home)
    assert (kept / "ca.crt").read_bytes() == old
    assert (kept / "ca.key").is_file()
    read_pair(home.certificate, home.key)
    issuer = read_certificate(home.ca_certificate.read_bytes(), "ca")
    read_certificate(home.certificate.read_bytes(), "it").verify_directly_issued_by(issuer)
    after = registry.invite("north")
    assert after.authority != before.authority
    assert "BEGIN CERTIFICATE" in OperatorFile.read(home.operator_file).ca
    home.ca_key.unlink()
    with pytest.raises(DeploymentError, match=r"ca.key cannot be read .* restore it from a backup"):
        rotate_certificate(home)


def test_service_files_are_listed(tmp_path: Path) -> None:
    made = make_coordinator(tmp_path / "c", "localhost", services=list(ServiceKind))
    names = [name for name, _ in made.files if name.startswith("service/")]
    assert names == ["service/fedtune-server.service", "service/Dockerfile", "service/compose.yaml"]
    assert all((made.home.path / name).is_file() for name in names)
