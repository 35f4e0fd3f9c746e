"""`python link_launcher.py HOME [--insecure]`: the link, with a registry in a file and with faults.

HOME/faults.json holds `{PATH: [STATUS, TIMES]}`: so often that path is answered so.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.deploy.flower_process import leave, start_log, talk_to_the_coordinator_alone
from fedtune.deploy.homes import CoordinatorHome


@dataclass(frozen=True)
class FileSite:
    name: str
    state: str
    public_key: str
    token: str


class FileSites:
    """The registry's part that a guard asks, over `HOME/test_sites.json`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _all(self) -> list[FileSite]:
        return [FileSite(**site) for site in json.loads(self._path.read_text("utf-8"))]

    def by_public_key(self, key: bytes) -> FileSite | None:
        return next((site for site in self._all() if site.public_key.encode() == key), None)

    def by_token(self, token: str) -> FileSite | None:
        return next((site for site in self._all() if site.token == token), None)

    def set_node(self, name: str, node_id: int) -> None:
        return


class Faults:
    """Answers a path with a status, a number of times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[str, int] = {}

    async def __call__(self, scope: Any) -> int | None:
        if not self._path.is_file():
            return None
        status, times = json.loads(self._path.read_text("utf-8")).get(scope["path"], (0, 0))
        done = self._done.get(scope["path"], 0)
        if done >= times:
            return None
        self._done[scope["path"]] = done + 1
        return int(status)


def main(path: Path, *, insecure: bool) -> None:
    home = CoordinatorHome(path)
    talk_to_the_coordinator_alone(home.flower)
    start_log("link", home.logs)
    from fedtune_server.link.serving import LinkParts, serve

    sites = FileSites(home.path / "test_sites.json")
    faults = Faults(home.path / "faults.json")
    parts = LinkParts(sites, lambda register: [], lambda register, forget: None, faults)
    serve(home, home.settings(), parts, insecure=insecure)
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), insecure="--insecure" in sys.argv)
