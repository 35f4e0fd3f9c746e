"""docs/deploy.md as a stranger follows it: its commands, in its order, with real processes.

A block that follows `<!-- run: MACHINE -->` is run on that machine: `coordinator`, `operator` (in
the coordinator's folder), `site` (each of them), `site NAME`. Machines are folders here, and the
page's host is loopback.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.config import load_run_config
from fedtune.deploy.homes import ServerSettings
from fedtune.deploy.policy_file import read_policy

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "deploy.md"
EXAMPLE = ROOT / "examples" / "deployment"
OPERATOR = "fedtune-server/operator.toml"
SITES = ("berlin", "lyon", "oslo")
DOWNLOADS = "oslo"
"""The site that joins without `--base`, as the page offers."""
RUN_S = 180.0

_BLOCK = re.compile(
    r"^<!-- (?P<kind>run|file): (?P<what>[^>]+?) -->\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FENCE = re.compile(r"^```console\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    what: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]


def page_blocks() -> list[Block]:
    text = PAGE.read_text(encoding="utf-8")
    return [Block(found["kind"], found["what"], found["text"]) for found in _BLOCK.finditer(text)]


def test_every_console_block_of_the_page_is_run() -> None:
    run = {block.text for block in page_blocks() if block.kind == "run"}
    text = PAGE.read_text(encoding="utf-8")
    shown = {found["text"] for found in _FENCE.finditer(text)}
    assert shown == run
    assert {block.what.split()[0] for block in page_blocks() if block.kind == "run"} == {
        "coordinator", "operator", "site",
    }  # fmt: skip


def test_the_files_of_the_example_are_right(stories260k: Path, tmp_path: Path) -> None:
    policy = read_policy(EXAMPLE / "policy.toml")
    assert (policy.hours, policy.share_logs) == (("20:00-06:30",), True)
    config = load_run_config(EXAMPLE / "run.toml")
    assert config.deployment.sites == ("*",)
    (block,) = _FENCE.finditer((EXAMPLE / "README.md").read_text(encoding="utf-8"))
    ((program, *words),) = Block("run", "", block["text"]).commands
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


def real_sites() -> ModuleType:
    path = ROOT / "benchmarks" / "real_sites" / "__init__.py"
    spec = importlib.util.spec_from_file_location("real_sites", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(*words: str) -> str:
    """What a command of `fedtune` prints, which must go well; in this process, to be quick."""
    with redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    assert code == 0, f"fedtune {shlex.join(words)}: {code}\n{out.getvalue()}"
    return out.getvalue()


@dataclass
class Walk:
    """Somebody who does what the page says, on machines that are folders."""

    folder: Path
    base: Path
    tools: ModuleType
    patch: pytest.MonkeyPatch
    ports: list[int]
    codes: dict[str, str] = field(default_factory=dict)
    started: dict[str, Any] = field(default_factory=dict)

    def place(self, machine: str) -> Path:
        return self.folder / ("coordinator" if machine == "operator" else machine)

    def do(self, block: Block) -> None:
        if block.kind == "file":
            text = block.text.replace("/srv/fedtune/base", str(self.base))
            (self.place("coordinator") / block.what).write_text(text, encoding="utf-8")
            return
        kind, _, name = block.what.partition(" ")
        machines = ([name] if name else SITES) if kind == "site" else [kind]
        for machine in machines:
            for command in block.commands:
                self.command(machine, command)
        for machine in machines:  # sites start side by side
            self.wait_for(machine)

    def command(self, machine: str, command: list[str]) -> None:
        self.patch.chdir(self.place(machine))
        program, *words = command
        if program == "tar":
            self.tar(words)
            return
        assert program == "fedtune", command
        verb = " ".join(words[:2])
        if verb in ("server start", "client start"):
            self.start(machine, words)
        elif verb == "server invite":
            self.codes[words[2]] = json.loads(said(*words, "--json"))["code"]
        elif verb == "client join":
            self.join(machine, words)
        elif words[0] == "resume":
            self.wait_until(words[1], "stopped")
            said(*words)
        elif words[0] == "watch":  # with a time limit, which this process has none for
            self.tools.fedtune(*words)
        else:
            said(*self.here(words))

    def here(self, words: list[str]) -> list[str]:
        """The page's words with this machine's host and ports."""
        host = f"{self.tools.HOST}:{self.ports[0]}"
        found = [word.replace("fl.example.org:9400", host) for word in words]
        found = [word.replace("fl.example.org", self.tools.HOST) for word in found]
        return [*found, "--port", str(self.ports[0])] if words[:2] == ["server", "init"] else found

    def join(self, site: str, words: list[str]) -> None:
        if "--again" in words and site in self.started:
            self.started.pop(site).stop()
        words = [self.codes[site] if word.startswith("FT1-") else word for word in words]
        if site == DOWNLOADS and "--base" in words:
            at = words.index("--base")
            del words[at : at + 2]
        said(*self.here(words))
        health, node = self.site_ports(site)
        for key, value in {"health_port": health, "node_port": node, "threads": 1}.items():
            self.set(Path("fedtune-site/client.toml"), key, value)

    def set(self, path: Path, key: str, value: object) -> None:
        text, count = re.subn(
            rf"(?m)^{key} = .*$", f"{key} = {json.dumps(value)}", path.read_text(encoding="utf-8")
        )
        assert count == 1
        path.write_text(text, encoding="utf-8")

    def site_ports(self, site: str) -> tuple[int, int]:
        first = 4 + 2 * SITES.index(site)
        return self.ports[first], self.ports[first + 1]

    def start(self, machine: str, words: list[str]) -> None:
        if machine in self.started:
            self.started.pop(machine).stop()
        if machine == "coordinator":
            # As section 3 says: sites may download the base.
            self.set(Path("fedtune-server/server.toml"), "bases", [str(self.base)])
        self.started[machine] = self.tools.Started(words, self.folder / f"{machine}.out")

    def wait_for(self, machine: str) -> None:
        if machine in self.started:
            own = machine == "coordinator"
            port = self.ports[3] if own else self.site_ports(machine)[0]
            self.tools.wait_for(
                f"{machine}'s health",
                lambda: self.tools.answers(port, self.started[machine]),
                60,
            )

    def tar(self, words: list[str]) -> None:
        if words[0].startswith("-x"):
            self.started.pop("coordinator").stop()
            shutil.rmtree("fedtune-server")
        subprocess.run(["tar", *words], check=True, timeout=60)

    def state(self, run: str) -> str:
        self.patch.chdir(self.place("coordinator"))
        lines = said("ps", "--json").splitlines()
        return next(str(it["state"]) for it in map(json.loads, lines) if it["name"] == run)

    def wait_until(self, run: str, state: str) -> None:
        self.tools.wait_for(f"{run} {state}", lambda: self.state(run) == state, RUN_S, 0.5)

    def online(self, run: str) -> dict[str, bool]:
        self.patch.chdir(self.place("coordinator"))
        found = json.loads(said("status", run, "--coordinator", OPERATOR, "--json"))["site_states"]
        return {site["name"]: site["online"] for site in found}


@pytest.fixture
def walk(tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    tools = real_sites()
    base = tmp_path / "base"
    shutil.copytree(stories260k, base)
    (tmp_path / "coordinator").mkdir()
    for at, site in enumerate(SITES):
        (tmp_path / site).mkdir()
        shutil.copytree(base, tmp_path / site / "base")
        rows = [{"prompt": f"{site} {i % 5}", "response": "ab"[i % 2]} for i in range(20 + 4 * at)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / site / "rows.jsonl").write_text(text, encoding="utf-8")
    ports = tools.free_ports(4 + 2 * len(SITES))
    found = Walk(tmp_path, base, tools, monkeypatch, ports)
    yield found
    for started in found.started.values():
        started.kill()


@pytest.mark.deployment
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_stranger_deploys_by_the_page(walk: Walk) -> None:
    for block in page_blocks():
        walk.do(block)
    assert walk.state("first") == "finished"
    assert walk.state("second") == "stopped"
    for site in SITES:
        assert (walk.folder / site / "fedtune-site/runs/first/report.html").is_file(), site
    downloaded = [path for path in (walk.folder / DOWNLOADS / "fedtune-site/bases").iterdir()]
    assert [len(path.name) for path in downloaded] == [64]
    # The authority is another one now: who joined anew is there, and nobody else.
    walk.tools.wait_for("berlin alone", lambda: walk.online("first")["berlin"], 30, 0.5)
    assert walk.online("first") == {"berlin": True, "lyon": False, "oslo": False}
    for machine in list(walk.started):
        walk.started.pop(machine).stop()
