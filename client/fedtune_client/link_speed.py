"""How fast bytes go to the coordinator and come back, before any training has shown it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpx

from fedtune.errors import RunError
from fedtune.wire.durable import write_durably
from fedtune_client.traffic_day import read_object

_FIRST_BYTES: Final = 16 * 1024
_MOST_BYTES: Final = 4_000_000
"""The coordinator answers no more at once."""
_LONG_S: Final = 0.5
"""A transfer that takes so long is measured well enough; chosen."""
_PATH: Final = "/fedtune/v1/echo"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Bytes per second; 0: not measured."""

    down_bytes_per_s: float = 0.0
    up_bytes_per_s: float = 0.0

    @property
    def slower(self) -> float:
        """Of both ways, the one that a round waits for; 0 if either is not known."""
        return min(self.down_bytes_per_s, self.up_bytes_per_s)


def known_link(state: Path) -> LinkSpeed:
    """What transfers have shown (`link.json`), or else the probe (`link_probe.json`)."""
    link, probe = read_object(state / "link.json"), read_object(state / "link_probe.json")
    return LinkSpeed(
        _rate(link, "down_bytes_per_s") or _rate(probe, "down_bytes_per_s"),
        _rate(link, "up_bytes_per_s") or _rate(probe, "up_bytes_per_s"),
    )


def measure_link(client: httpx.Client, clock: Callable[[], float] = time.perf_counter) -> LinkSpeed:
    """Measure both ways, with transfers that double until one takes long enough.

    It takes about two seconds, and on a line below 30 kB/s those of the first two transfers.

    Args:
        client: with the coordinator's address, its CA and the site's token.

    Raises:
        httpx.HTTPError: the coordinator does not answer, or refuses.
    """

    def down(size: int) -> None:
        got = len(client.get(_PATH, params={"bytes": size}).raise_for_status().content)
        if got != size:
            raise httpx.RemoteProtocolError(f"expected {size} bytes, got {got}")

    def up(size: int) -> None:
        client.post(_PATH, content=bytes(size)).raise_for_status()

    client.get(_PATH, params={"bytes": 1}).raise_for_status()  # connects; is not timed
    return LinkSpeed(_speed(down, clock), _speed(up, clock))


def probe_link(client: httpx.Client, state: Path) -> LinkSpeed:
    """Measure, and keep the result for the next process; zeros where nothing can be measured."""
    try:
        found = measure_link(client)
    except httpx.HTTPError as error:
        _log.warning("the link cannot be measured yet: %s", error)
        return LinkSpeed()
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    tree = asdict(found) | {"measured": measured}
    try:
        state.mkdir(parents=True, exist_ok=True)
        write_durably(state / "link_probe.json", json.dumps(tree).encode())
    except (OSError, RunError) as error:
        _log.warning("the link's speed is not kept: %s", error)
    return found


def _speed(transfer: Callable[[int], None], clock: Callable[[], float]) -> float:
    size = _FIRST_BYTES
    while True:
        started = clock()
        transfer(size)
        seconds = max(clock() - started, 1e-9)
        if seconds >= _LONG_S or 2 * size > _MOST_BYTES:
            return size / seconds
        size *= 2


def _rate(tree: dict[str, object], key: str) -> float:
    value = tree.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < float(value) < 1e13 else 0.0  # type: ignore[arg-type]
