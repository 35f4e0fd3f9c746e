"""Puts the desk together for a home and runs it until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.errors import FedtuneError
from fedtune_server.desk.artifact_service import ArtifactService
from fedtune_server.desk.artifacts import Bases, Digests
from fedtune_server.desk.calls import Guard
from fedtune_server.desk.credentials import Gate, SiteRegistry
from fedtune_server.desk.facts import Desk
from fedtune_server.desk.orders import Orders
from fedtune_server.desk.player import FlowerControl, Player
from fedtune_server.desk.presence import Presence
from fedtune_server.desk.queue import Queue
from fedtune_server.desk.rates import Bandwidth
from fedtune_server.desk.run_service import RunService
from fedtune_server.desk.serving import (
    Certificate,
    listen,
    make_server,
    plain_warning,
    set_serving,
)
from fedtune_server.desk.site_logs import SiteLogs
from fedtune_server.desk.site_service import SiteService
from fedtune_server.desk.telemetry import write_metrics
from fedtune_server.operator_token import OperatorToken

METRICS_S = 5.0
_MOST_METRICS_S = 30.0
"""The health port leaves out a file that is older than twice this."""
_COST_SHARE = 5.0
"""A count of long ledgers is made seldom: it costs at most a fifth of a core."""
_GRACE_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The desk of a home; `player` is to be played, `server` to be started."""

    home: CoordinatorHome
    settings: ServerSettings
    desk: Desk
    player: Player
    orders: Orders
    make_server: Callable[[], Any]


def assemble(
    home: CoordinatorHome,
    settings: ServerSettings,
    registry: SiteRegistry,
    control: FlowerControl,
    make_fab: Callable[[Mapping[str, str]], bytes],
) -> Parts:
    """The parts of a desk, which has no port and plays nothing yet."""
    queue, presence = Queue(home.queue), Presence()
    player = Player(queue, home.runs, control, make_fab)
    desk = Desk(queue, home.runs, player, presence, registry)
    orders = Orders(queue, home.runs, player, presence, registry)
    gate = Gate(OperatorToken(home.operator_file), registry)
    logs = SiteLogs(home.logs / "sites")
    state, limits = home.path / "state", settings.limits

    def server() -> Any:  # made inside the event loop that it belongs to
        return make_server(
            RunService(desk, orders, logs),
            SiteService(gate, presence, logs),
            ArtifactService(
                gate,
                desk,
                Bases([Path(folder) for folder in settings.bases], state / "bases"),
                Digests(state / "digests"),
                Bandwidth(limits.download_bytes_per_s),
            ),
            Guard(gate, presence, limits.requests_per_s, limits.burst),
        )

    return Parts(home, settings, desk, player, orders, server)


async def serve(
    parts: Parts,
    stop: asyncio.Event,
    insecure: bool = False,
    opened: Callable[[int], object] = lambda port: None,
    metrics: Callable[[], bytes] = lambda: b"",
) -> None:
    """Answer calls and play runs until told to stop.

    Args:
        opened: is told the port once calls are answered.
        metrics: the text for Prometheus, kept in state/desk.prom.

    Raises:
        DeploymentError: the port is taken, or the certificate cannot be read.
    """
    home, settings = parts.home, parts.settings
    server = parts.make_server()
    address = f"{_bracketed(settings.bind)}:{settings.service_port}"
    if insecure:
        plain_warning(address, _log.warning)
    credentials = None if insecure else Certificate(home.certificate, home.key).credentials()
    port = listen(server, address, credentials)
    parts.orders.tell_sites()
    playing = threading.Thread(target=parts.player.play, name="player", daemon=True)
    playing.start()
    await server.start()
    await set_serving(server)
    opened(port)
    try:
        while not stop.is_set():
            took_s = await asyncio.to_thread(_measure, parts, metrics)
            pause_s = min(max(METRICS_S, _COST_SHARE * took_s), _MOST_METRICS_S)
            try:
                await asyncio.wait_for(stop.wait(), pause_s)
            except TimeoutError:
                continue
    finally:
        parts.player.close()
        await server.stop(_GRACE_S)
        playing.join(_GRACE_S)


def _measure(parts: Parts, metrics: Callable[[], bytes]) -> float:
    """Write the metrics; the seconds that it took."""
    began = time.monotonic()
    try:
        parts.desk.count()
        write_metrics(parts.home.path / "state" / "desk.prom", metrics())
    except FedtuneError as error:
        _log.warning("runs and sites cannot be counted: %s", error)
    return time.monotonic() - began


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address and not address.startswith("[") else address
