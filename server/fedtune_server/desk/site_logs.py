"""The log lines that sites send: kept in one file a site, bounded, with nothing in them that acts.

    HOME/logs/sites/NAME.log  NAME.log.1

Lines come from the network: each is made one JSON object on one line, clipped, and a site that
sends more than its share loses the rest.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from fedtune.deploy.channel import one_line
from fedtune_server.desk.rates import PeerRates

MOST_LINES = 200
"""Of one message; a site that has more sends them with the next."""
_MOST_CHARACTERS = 8192
_ROTATE_BYTES = 5_000_000
_CHARACTERS_PER_S, _CHARACTERS_BURST = 20_000.0, 1_000_000.0
"""Of one site: far above what a site at work says, and nothing to clean for a coordinator."""

_log = logging.getLogger(__name__)


class SiteLogs:
    """Writes and reads the files; names are those of the registry, never of the network."""

    def __init__(self, folder: Path, rotate_bytes: int = _ROTATE_BYTES) -> None:
        self._folder, self._rotate_bytes = folder, rotate_bytes
        self._rates = PeerRates(_CHARACTERS_PER_S, _CHARACTERS_BURST)
        self._lock = threading.Lock()

    def path(self, site: str) -> Path:
        """The file of a site's newest lines."""
        return self._folder / f"{site}.log"

    def keep(self, site: str, lines: Sequence[str]) -> None:
        """Append lines; a disk that is full costs the lines and nothing else."""
        clipped = (line[:_MOST_CHARACTERS] for line in lines[:MOST_LINES])
        kept = [_clean(line) for line in clipped if self._rates.take(site, len(line) + 1)]
        if not kept:
            return
        content = "".join(f"{line}\n" for line in kept).encode("utf-8", "replace")
        path = self.path(site)
        with self._lock:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and path.stat().st_size + len(content) > self._rotate_bytes:
                    os.replace(path, path.with_name(f"{path.name}.1"))
                with path.open("ab") as file:
                    file.write(content)
            except OSError as error:
                _log.warning("log lines of %s are lost: %s", site, error.strerror)

    def tail(self, site: str, lines: int) -> list[str]:
        """The last lines of a site, the oldest first."""
        found: list[str] = []
        for path in (self.path(site).with_name(f"{site}.log.1"), self.path(site)):
            try:
                found += path.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError:
                continue
        return found[-lines:] if lines else []


def _clean(line: str) -> str:
    """One JSON object on one line: the line itself if it is one, else with it as its message."""
    line = one_line(line, _MOST_CHARACTERS)
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        return json.dumps({"message": line}, ensure_ascii=False)
    return line
