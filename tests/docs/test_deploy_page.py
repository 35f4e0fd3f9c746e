"""docs/deploy.md as a stranger follows it (`tests/docs/walk.py`).

Its machines are `coordinator`, `operator` (in the coordinator's folder), `site` (each of them) and
`site NAME`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.config import load_run_config
from fedtune.deploy.homes import ServerSettings
from fedtune.deploy.policy_file import read_policy
from tests.deployment.conftest import real_sites
from tests.docs.walk import (
    COORDINATOR_PORTS,
    DOCS,
    SITE_PORTS,
    Block,
    Walk,
    fenced,
    lay_out_site,
    machines,
    marked,
    said,
    set_key,
)

ROOT = DOCS.parent
PAGE = DOCS / "deploy.md"
EXAMPLE = ROOT / "examples" / "deployment"
OPERATOR = "fedtune-server/operator.toml"
SITES = ("berlin", "lyon", "oslo")
DOWNLOADS = "oslo"
"""The site that joins without `--base`, as the page offers."""


def test_every_console_block_of_the_page_is_run() -> None:
    run = [block.text for block in marked(PAGE) if block.kind == "run"]
    assert fenced(PAGE, "console") == run
    assert machines(PAGE) == {"coordinator", "operator", "site"}


def test_the_files_of_the_example_are_right(stories260k: Path, tmp_path: Path) -> None:
    policy = read_policy(EXAMPLE / "policy.toml")
    assert (policy.hours, policy.share_logs) == (("20:00-06:30",), True)
    config = load_run_config(EXAMPLE / "run.toml")
    assert config.deployment.sites == ("*",)
    (text,) = fenced(EXAMPLE / "README.md", "console")
    ((program, *words),) = Block("run", "", text).commands
    assert program == "fedtune"
    words = [word.replace("BASE", str(stories260k)) for word in words]
    words[1] = str(EXAMPLE / "run.toml")
    assert main([*words, "--output", str(tmp_path)]) == 0


def test_the_proxy_listens_where_the_coordinator_does() -> None:
    text = (EXAMPLE / "nginx.conf").read_text(encoding="utf-8")
    settings = ServerSettings(host="x")
    for port in (settings.port, settings.service_port):
        assert f":{port};" in text
        assert f"proxy_pass 127.0.0.1:{port};" in text
    for key in re.findall(r"(?m)^#   (\w+) =", text):
        assert key in ServerSettings.model_fields


class DeployWalk(Walk):
    """What is this page's alone: the operator, a download, a restored backup."""

    def place(self, machine: str) -> Path:
        return super().place("coordinator" if machine == "operator" else machine)

    def command(self, machine: str, command: list[str]) -> None:
        if command[0] == "tar":
            self.tar(command)
            return
        if command[1] == "resume":
            self.wait_until("coordinator", command[2], OPERATOR, "stopped")
        super().command(machine, command)

    def join(self, machine: str, words: list[str]) -> None:
        home = self.place(machine) / "fedtune-site"
        if "--again" in words and home in self.started:
            self.started.pop(home).stop()
        if machine == DOWNLOADS and "--base" in words:
            at = words.index("--base")
            words = words[:at] + words[at + 2 :]
        super().join(machine, words)

    def start(self, machine: str, words: list[str]) -> None:
        if machine == "coordinator":
            # As section 3 says: sites may download the base.
            set_key(Path("fedtune-server/server.toml"), "", "bases", [str(self.base)])
        super().start(machine, words)

    def tar(self, command: list[str]) -> None:
        if command[1].startswith("-x"):
            self.started.pop(self.place("coordinator") / "fedtune-server").stop()
            shutil.rmtree("fedtune-server")
        subprocess.run(command, check=True, timeout=60)

    def run_state(self, run: str) -> str:
        return self.state("coordinator", run, OPERATOR)

    def online(self, run: str) -> dict[str, bool]:
        self.go_to("coordinator")
        found = json.loads(said("status", run, "--coordinator", OPERATOR, "--json"))["site_states"]
        return {site["name"]: site["online"] for site in found}


@pytest.fixture
def walk(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DeployWalk]:
    base = tmp_path / "base"
    shutil.copytree(stories260k, base)
    (tmp_path / "coordinator").mkdir()
    for at, site in enumerate(SITES):
        rows = [{"prompt": f"{site} {i % 5}", "response": "ab"[i % 2]} for i in range(20 + 4 * at)]
        lay_out_site(tmp_path / site, rows, base)
    ports = real_sites().free_ports(COORDINATOR_PORTS + SITE_PORTS * len(SITES))
    found = DeployWalk(tmp_path, base, monkeypatch, iter(ports), SITES)
    yield found
    found.kill_all()


@pytest.mark.deployment
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_stranger_deploys_by_the_page(walk: DeployWalk) -> None:
    for block in marked(PAGE):
        walk.do(block)
    assert walk.run_state("first") == "finished"
    assert walk.run_state("second") == "stopped"
    for site in SITES:
        assert (walk.folder / site / "fedtune-site/runs/first/report.html").is_file(), site
    downloaded = [path for path in (walk.folder / DOWNLOADS / "fedtune-site/bases").iterdir()]
    assert [len(path.name) for path in downloaded] == [64]
    # The authority is another one now: who joined anew is there, and nobody else.
    walk.tools.wait_for("berlin alone", lambda: walk.online("first")["berlin"], 30, 0.5)
    assert walk.online("first") == {"berlin": True, "lyon": False, "oslo": False}
    walk.stop_all()
