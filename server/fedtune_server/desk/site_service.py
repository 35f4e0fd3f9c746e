"""SiteService: one stream for each site, in which it tells of itself and is told what to stop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc

from fedtune.deploy.channel import one_line
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import SiteServiceServicer
from fedtune_server.desk.calls import CallRefusedError, caller
from fedtune_server.desk.credentials import Gate
from fedtune_server.desk.presence import Presence
from fedtune_server.desk.rates import Bucket
from fedtune_server.desk.site_logs import SiteLogs
from fedtune_server.desk.view import SiteReport

_STATUS_PER_S, _STATUS_BURST = 5.0, 100.0
_LOOK_S = 5.0
"""How often it is asked whether the site has been revoked."""
_MOST_VERSIONS = 32
_MOST_COUNT = 1 << 62


class SiteService(SiteServiceServicer):
    """Hears every site and tells it which runs are stopped."""

    def __init__(self, gate: Gate, presence: Presence, logs: SiteLogs) -> None:
        self._gate, self._presence, self._logs = gate, presence, logs

    async def Connect(self, requests: Any, context: Any) -> AsyncIterator[pb.SiteOrder]:
        """Hear a site until it goes, and tell it of stopped runs: all of them, at each change."""
        site = caller().name
        with self._presence.connected(site) as orders:
            hearing = asyncio.ensure_future(self._hear(site, requests))
            hearing.add_done_callback(lambda _: orders.announce())
            try:
                told: tuple[str, ...] | None = None
                while not hearing.done():
                    if orders.replaced:
                        raise CallRefusedError(
                            grpc.StatusCode.ABORTED, f"site {site} connected anew elsewhere"
                        )
                    await asyncio.to_thread(self._gate.check_still_admitted, site)
                    stopped = self._presence.stopped
                    if stopped != told:
                        yield pb.SiteOrder(stopped_runs=stopped)
                        told = stopped
                    await orders.wait(_LOOK_S)
                hearing.result()
            finally:
                hearing.cancel()

    async def _hear(self, site: str, requests: Any) -> None:
        rate = Bucket(_STATUS_PER_S, _STATUS_BURST)
        async for status in requests:
            if not rate.take():
                raise CallRefusedError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"site {site} tells of itself more than {_STATUS_PER_S:g} times a second",
                )
            self._presence.hear(site, read_report(status))
            if status.log_lines:
                lines = list(status.log_lines)
                await asyncio.to_thread(self._logs.keep, site, lines)


def read_report(status: pb.SiteStatus) -> SiteReport:
    """What a site told, with everything clipped that could be too long, too large or not finite."""
    versions = {
        one_line(key, 40): one_line(value, 80)
        for key, value in sorted(status.versions.items())[:_MOST_VERSIONS]
    }
    return SiteReport(
        state=one_line(status.state, 40),
        run=one_line(status.run, 100),
        round=status.round,
        step=status.step,
        steps=status.steps,
        memory_bytes=min(status.memory_bytes, _MOST_COUNT),
        memory_allowed_bytes=min(status.memory_allowed_bytes, _MOST_COUNT),
        bytes_down_today=min(status.bytes_down_today, _MOST_COUNT),
        bytes_up_today=min(status.bytes_up_today, _MOST_COUNT),
        link_down_bytes_per_s=_speed(status.link_down_bytes_per_s),
        link_up_bytes_per_s=_speed(status.link_up_bytes_per_s),
        last_refusal=one_line(status.last_refusal, 500),
        versions=versions,
        device=one_line(status.device, 200),
    )


def _speed(value: float) -> float:
    return value if math.isfinite(value) and 0 <= value < 1e15 else 0.0
