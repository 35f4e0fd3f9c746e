"""RunService: what operators ask of runs and sites."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import RunServiceServicer
from fedtune_server.desk.calls import caller
from fedtune_server.desk.facts import Desk
from fedtune_server.desk.ledger_lines import LedgerLines
from fedtune_server.desk.orders import Orders
from fedtune_server.desk.queue import UnknownRunError
from fedtune_server.desk.site_logs import SiteLogs
from fedtune_server.desk.view import RunEntry, SiteEntry, SiteReport

_POLL_S = 0.5
_USUAL_TAIL, _MOST_TAIL = 100, 10_000

_T = TypeVar("_T")


class RunService(RunServiceServicer):
    """Answers from the desk's view; work on disk is done off the event loop."""

    def __init__(self, desk: Desk, orders: Orders, logs: SiteLogs) -> None:
        self._desk, self._orders, self._logs = desk, orders, logs

    async def StartRun(self, request: pb.StartRunRequest, context: Any) -> pb.RunInfo:
        """Want a run."""
        run = await _off(lambda: self._orders.start(request.config_json, request.overwrite))
        return await self._info(run.name)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsReply:
        """All runs."""
        return pb.ListRunsReply(runs=map(run_info, await _off(self._desk.runs)))

    async def GetRun(self, request: pb.RunName, context: Any) -> pb.RunInfo:
        """One run; a site may ask for those in which it takes part."""
        entry = await _off(lambda: self._desk.run(request.name))
        who = caller()
        if who.role == "site" and not self._desk.takes_part(who.name, request.name):
            raise UnknownRunError(f"no run is called {request.name[:100]!r} here")
        return run_info(entry)

    async def StopRun(self, request: pb.RunName, context: Any) -> pb.RunInfo:
        """Want a run to stop."""
        await _off(lambda: self._orders.stop(request.name))
        return await self._info(request.name)

    async def ResumeRun(self, request: pb.RunName, context: Any) -> pb.RunInfo:
        """Want a run to go on."""
        await _off(lambda: self._orders.resume(request.name))
        return await self._info(request.name)

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: Any
    ) -> AsyncIterator[pb.RunEvent]:
        """The ledger's lines, until the run has ended.

        Lines that begin again at 1 are of a ledger that replaced the one before.
        """
        folder = await _off(lambda: self._desk.folder(request.name))
        lines, after = LedgerLines(folder / "ledger.jsonl"), request.after
        while True:
            # Asked before the lines are read: what was written until then is not missed.
            over = (await _off(lambda: self._desk.run(request.name))).state in _OVER
            anew, found = await _off(lines.read)
            after = 0 if anew else after
            for line in found:
                if line.line > after:
                    yield pb.RunEvent(line=line.line, json=line.json)
            if not found:
                if over:
                    return
                await asyncio.sleep(_POLL_S)

    async def ListSites(self, request: pb.ListSitesRequest, context: Any) -> pb.ListSitesReply:
        """All sites of the registry."""
        return pb.ListSitesReply(sites=map(site_info, await _off(self._desk.sites)))

    async def SiteLogs(
        self, request: pb.SiteLogsRequest, context: Any
    ) -> AsyncIterator[pb.LogLine]:
        """A site's last log lines, and those to come."""
        site = await _off(lambda: self._desk.site_named(request.site))
        follow = LedgerLines(self._logs.path(site))
        if request.follow:
            while (await _off(follow.read))[1]:
                pass
        tail = min(request.tail or _USUAL_TAIL, _MOST_TAIL)
        for text in await _off(lambda: self._logs.tail(site, tail)):
            yield pb.LogLine(json=text)
        while request.follow:
            _, found = await _off(follow.read)
            for line in found:
                yield pb.LogLine(json=line.json)
            if not found:
                await asyncio.sleep(_POLL_S)

    async def _info(self, name: str) -> pb.RunInfo:
        return run_info(await _off(lambda: self._desk.run(name)))


_OVER = ("stopped", "finished", "failed")


async def _off(work: Callable[[], _T]) -> _T:
    return await asyncio.to_thread(work)


def run_info(run: RunEntry) -> pb.RunInfo:
    """A run as it is sent."""
    return pb.RunInfo(
        name=run.name,
        run=run.run,
        state=run.state,
        round=run.round,
        rounds=run.rounds,
        since=run.since,
        updated=run.updated,
        restarts=run.restarts,
        reason=run.reason,
        devices=run.devices,
        bytes_sent=run.bytes_sent,
        bytes_received=run.bytes_received,
    )


def site_info(site: SiteEntry) -> pb.SiteInfo:
    """A site as it is sent."""
    return pb.SiteInfo(
        name=site.name,
        state=site.state,
        online=site.online,
        last_seen=site.last_seen,
        status=None if site.report is None else _status(site.report),
    )


def _status(report: SiteReport) -> pb.SiteStatus:
    return pb.SiteStatus(
        state=report.state,
        run=report.run,
        round=report.round,
        step=report.step,
        steps=report.steps,
        memory_bytes=report.memory_bytes,
        memory_allowed_bytes=report.memory_allowed_bytes,
        bytes_down_today=report.bytes_down_today,
        bytes_up_today=report.bytes_up_today,
        link_down_bytes_per_s=report.link_down_bytes_per_s,
        link_up_bytes_per_s=report.link_up_bytes_per_s,
        last_refusal=report.last_refusal,
        versions=report.versions,
        device=report.device,
    )
