"""A page of the docs as a stranger follows it: its commands, in its order, with real processes.

A block that follows `<!-- run: MACHINE -->` is run on that machine. One that follows
`<!-- file: MACHINE/NAME -->` is a file there, and one that follows `<!-- edit: MACHINE/NAME -->`
holds keys of a file that is there, with the values that they shall have. Machines are folders here,
hosts are loopback, and ports are free ones.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.deploy.homes import CoordinatorHome, SiteHome
from fedtune.deploy.operator import DEFAULT_COORDINATOR_HOME, DEFAULT_SITE_HOME
from tests.deployment.conftest import real_sites

DOCS = Path(__file__).resolve().parents[2] / "docs"
RUN_S = 180.0
"""Longest that a run of a page may take on a machine that does other work, too."""
HEALTHY_S = 60.0
COORDINATOR_PORTS, SITE_PORTS = 4, 2
_PAGE_PORT = 9400

_BLOCK = re.compile(
    r"^<!-- (?P<kind>run|file|edit): (?P<what>[^>]+?) -->\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    what: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]


def marked(page: Path) -> list[Block]:
    """The blocks of a page that are followed, in its order."""
    text = page.read_text(encoding="utf-8")
    return [Block(found["kind"], found["what"], found["text"]) for found in _BLOCK.finditer(text)]


def fenced(page: Path, language: str) -> list[str]:
    """The texts of all blocks of a language, marked or not."""
    found = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [block["text"] for block in found if block["language"] == language]


def machines(page: Path) -> set[str]:
    """Where a page has commands run: the first word of each mark."""
    return {block.what.split()[0] for block in marked(page) if block.kind == "run"}


def said(*words: str) -> str:
    """What a command of `fedtune` prints, which must go well; in this process, to be quick."""
    with redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    assert code == 0, f"fedtune {shlex.join(words)}: {code}\n{out.getvalue()}"
    return out.getvalue()


def set_key(path: Path, section: str, key: str, value: object) -> None:
    """Change a key of a TOML file that is there, as with an editor; `section` may be empty."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at, changed = "", 0
    for number, line in enumerate(lines):
        if heading := re.match(r"\[(.+)\]\s*$", line):
            at = heading[1]
        elif at == section and re.match(rf"{re.escape(key)} = ", line):
            lines[number] = f"{key} = {json.dumps(value)}\n"
            changed += 1
    assert changed == 1, f"{path}: [{section}] {key} stands there {changed} times"
    path.write_text("".join(lines), encoding="utf-8")


@dataclass
class Walk:
    """Somebody who does what a page says, on machines that are folders.

    Attributes:
        base: the base model's folder at coordinators, /srv/fedtune/base on a page.
        sites: machines that a mark `site` means, each.
        ports: those that homes are given as they are made.
        hosts: the page's name of a coordinator -> where it listens here.
        codes: site -> its join code. A site is called as its machine is.
        started: home -> its process.
    """

    folder: Path
    base: Path
    patch: pytest.MonkeyPatch
    ports: Iterator[int]
    sites: Sequence[str] = ()
    tools: ModuleType = field(default_factory=real_sites)
    hosts: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    started: dict[Path, Any] = field(default_factory=dict)

    def place(self, machine: str) -> Path:
        return self.folder / machine

    def go_to(self, machine: str) -> Path:
        self.patch.chdir(self.place(machine))
        return self.place(machine)

    def do(self, block: Block) -> None:
        if block.kind == "run":
            self.run(block)
            return
        path, text = self.folder / block.what, block.text
        if block.kind == "file":
            path.write_text(text.replace("/srv/fedtune/base", str(self.base)), encoding="utf-8")
            return
        for section, keys in tomllib.loads(text).items():
            for key, value in keys.items():
                set_key(path, section, key, value)

    def run(self, block: Block) -> None:
        kind, _, name = block.what.partition(" ")
        where = ([name] if name else self.sites) if kind == "site" else [kind]
        before = dict(self.started)
        for machine in where:
            for command in block.commands:
                self.go_to(machine)
                self.command(machine, command)
        for home, process in self.started.items():  # sites start side by side
            if before.get(home) is not process:
                self.wait_for(home)

    def command(self, machine: str, command: list[str]) -> None:
        program, *words = command
        assert program == "fedtune", command
        verb = " ".join(words[:2])
        if verb in ("server start", "client start"):
            self.start(machine, words)
        elif verb == "server init":
            self.init(words)
        elif verb == "server invite":
            self.codes[words[2]] = json.loads(said(*words, "--json"))["code"]
        elif verb == "client join":
            self.join(machine, words)
        elif words[0] in ("run", "watch") and "--detach" not in words:
            self.follow(machine, words)  # with a time limit, which this process has none for
        else:
            said(*words)

    def init(self, words: list[str]) -> None:
        first, *_ = [next(self.ports) for _ in range(COORDINATOR_PORTS)]
        host = words.index("--host") + 1
        self.hosts[words[host]] = f"{self.tools.HOST}:{first}"
        words[host] = self.tools.HOST
        said(*words, "--port", str(first))

    def join(self, machine: str, words: list[str]) -> None:
        """With the code that the machine was given; a site that joins anew keeps its ports."""
        words = [self.codes[machine] if word.startswith("FT1-") else word for word in words]
        server = words.index("--server") + 1
        host, _, port = words[server].rpartition(":")
        assert int(port) == _PAGE_PORT
        words[server] = self.hosts[host]
        said(*words)
        if "--again" not in words:
            home = words[words.index("--dir") + 1] if "--dir" in words else DEFAULT_SITE_HOME
            path = SiteHome(Path(home)).settings_file
            set_key(path, "site", "health_port", next(self.ports))
            set_key(path, "site", "node_port", next(self.ports))
            set_key(path, "device", "threads", 1)

    def start(self, machine: str, words: list[str]) -> None:
        """Start a home, which the words name or which has the default name; again, if it runs."""
        home = home_of(self.place(machine), words)
        if home in self.started:
            self.started.pop(home).stop()
        self.started[home] = self.tools.Started(words, self.folder / f"{machine}-{home.name}.out")

    def wait_for(self, home: Path) -> None:
        site = SiteHome(home)
        port = (
            site.settings().site.health_port
            if site.settings_file.is_file()
            else CoordinatorHome(home).settings().health_port
        )
        process = self.started[home]
        self.tools.wait_for(
            f"{home}'s health", lambda: self.tools.answers(port, process), HEALTHY_S
        )

    def follow(self, machine: str, words: list[str]) -> None:
        """`run` or `watch` to the end of the run, which must finish."""
        log = self.folder / f"{machine}-{words[0]}.out"
        following = self.tools.Started(words, log)
        try:
            code = following.wait(RUN_S)
        except subprocess.TimeoutExpired:
            following.kill()
            pytest.fail(f"fedtune {shlex.join(words)}: not over\n{log.read_text()[-3000:]}")
        assert code == 0, f"fedtune {shlex.join(words)}: {code}\n{log.read_text()[-3000:]}"

    def state(self, machine: str, run: str, operator: str) -> str:
        self.go_to(machine)
        lines = said("ps", "--json", "--coordinator", operator).splitlines()
        return next(str(it["state"]) for it in map(json.loads, lines) if it["name"] == run)

    def wait_until(self, machine: str, run: str, operator: str, state: str) -> None:
        self.tools.wait_for(
            f"{run} {state}", lambda: self.state(machine, run, operator) == state, RUN_S, 0.5
        )

    def stop_all(self) -> None:
        """End every process as an operator does."""
        for home in list(self.started):
            self.started.pop(home).stop()

    def kill_all(self) -> None:
        for process in self.started.values():
            process.kill()


def home_of(folder: Path, words: Sequence[str]) -> Path:
    """The home that `server start` or `client start` names in a folder."""
    default = DEFAULT_COORDINATOR_HOME if words[0] == "server" else DEFAULT_SITE_HOME
    named = [word for word in words[2:] if not word.startswith("-")]
    return folder / (named[0] if named else default)


def lay_out_site(folder: Path, rows: Sequence[dict[str, str]], base: Path) -> None:
    """A site's machine: its rows and its copy of the base."""
    folder.mkdir()
    shutil.copytree(base, folder / "base")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
