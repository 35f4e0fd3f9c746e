"""`fedtune client pull`: what a run made, brought to a site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli.client_pull import pull
from fedtune.errors import DeploymentError
from fedtune_server.desk.queue import Queue, Wanted
from tests.fedtune_server.desk.office import Office, config, opened_office


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with opened_office(tmp_path / "home") as found:
        ended = Wanted("demo", config().model_dump_json(), "2026", "stopped", "stopped")
        Queue(found.parts.home.queue).put(ended)
        exports = found.folder("demo") / "exports" / "peft"
        exports.mkdir(parents=True)
        (exports / "adapter_model.safetensors").write_bytes(b"adapter")
        yield found


def make_site(folder: Path, address: str) -> Path:
    folder.mkdir()
    (folder / "client.toml").write_text(
        f'[site]\nname = "north"\nserver = "{address}"\nservice = "{address}"\n'
    )
    (folder / "token").write_text("token-of-north\n")
    (folder / "ca.crt").write_text("none")
    return folder


def test_a_site_pulls_a_run(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = make_site(tmp_path / "site", office.address)
    pull("demo", folder=site, insecure=True)
    found = site / "runs" / "demo" / "exports" / "peft" / "adapter_model.safetensors"
    assert found.read_bytes() == b"adapter"
    shown = capsys.readouterr()
    assert shown.out == f"1 files, 7 B, in {site / 'runs' / 'demo'}\n"
    assert "without TLS" in shown.err
    pull("demo", folder=site, to=tmp_path / "there", insecure=True)
    assert (tmp_path / "there" / "exports").is_dir()


def test_a_name_is_not_a_path(office: Office, tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", office.address)
    for name in ("../demo", "..", "a/b", "a\\b"):
        with pytest.raises(DeploymentError, match="is not the name of a run"):
            pull(name, folder=site, insecure=True)


def test_a_folder_that_is_no_site_is_said(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="fedtune client join"):
        pull("demo", folder=tmp_path)
