"""`fedtune server`: what an operator types, reads, and is told when it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.deploy.homes import CoordinatorHome


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CoordinatorHome:
    monkeypatch.chdir(tmp_path)
    return CoordinatorHome(tmp_path / "fedtune-server")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_the_first_ten_minutes(home: CoordinatorHome, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "init", "--host", "fed.example.org"]) == 0
    out = said(capsys)
    assert f"made {home.path}" in out
    assert out.splitlines()[-2:] == [
        "next: fedtune server invite SITE",
        "then: fedtune server start",
    ]
    assert main(["server", "sites"]) == 0
    assert "no sites yet; invite one: fedtune server invite SITE" in said(capsys)
    assert main(["server", "invite", "north", "--days", "2"]) == 0
    out = said(capsys)
    assert "fedtune client join FT1-" in out
    assert "--server fed.example.org:9400" in out
    assert main(["server", "sites"]) == 0
    row = said(capsys).splitlines()[1]
    assert row.split()[:2] == ["north", "invited"]
    assert main(["server", "revoke", "north"]) == 0
    assert "fedtune server invite north --again" in said(capsys)
    assert main(["server", "invite", "north", "--again", "--json"]) == 0
    assert json.loads(said(capsys)).keys() == {"site", "code", "server", "expires"}
    assert main(["server", "rotate"]) == 0
    assert "made a new certificate for 824 days" in said(capsys)
    assert main(["server", "rotate", "--token"]) == 0
    assert "new operator token" in said(capsys)
    assert main(["server", "rotate", "--ca"]) == 0
    assert "fedtune server invite SITE --again" in said(capsys)


def test_a_listing_for_programs_holds_no_secret(
    home: CoordinatorHome, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["server", "init", "--host", "localhost"])
    main(["server", "invite", "north"])
    capsys.readouterr()
    assert main(["server", "sites", "--json"]) == 0
    site = json.loads(said(capsys))
    assert site.keys() == {"site", "state", "since", "node_id", "code_open", "code_expires"}


def test_wrong_uses_are_told_in_one_line(
    home: CoordinatorHome, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (["invite", "a"], ["revoke", "a"], ["sites"], ["rotate"], ["rotate", "--ca"]):
        assert main(["server", *verb]) == 2
        assert "make one with: fedtune server init --host NAME" in refused(capsys)
    assert main(["server", "init"]) == 2
    assert "--host" in refused(capsys)
    assert main(["server", "init", "--host", "http://x"]) == 2
    assert "expected a host's name or address" in refused(capsys)
    assert main(["server", "init", "--host", "localhost", "c"]) == 0
    capsys.readouterr()
    assert main(["server", "init", "--host", "localhost", "c"]) == 2
    assert "nothing is overwritten" in refused(capsys)
    assert main(["server", "invite", "../x", "--dir", "c"]) == 2
    assert "expected a site's name" in refused(capsys)
    main(["server", "invite", "north", "--dir", "c"])
    capsys.readouterr()
    assert main(["server", "revoke", "nort", "--dir", "c"]) == 2
    assert "did you mean north?" in refused(capsys)
    assert main(["client", "join", "FT1-AAAA", "--server", "localhost:9400"]) == 2
    assert "expected 10 groups of 5 characters" in refused(capsys)
    assert not Path("fedtune-site").exists()
