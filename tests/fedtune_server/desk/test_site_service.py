"""SiteService on loopback: what sites tell and are told, and hostile words."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import RunServiceStub, SiteServiceStub
from fedtune_server.desk import presence as presence_module
from fedtune_server.desk.presence import Presence
from fedtune_server.desk.site_logs import SiteLogs
from fedtune_server.desk.site_service import read_report
from fedtune_server.desk.view import SiteReport
from tests.fedtune_server.desk.office import Office, config, opened_office, until


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with opened_office(tmp_path / "home") as found:
        yield found


class Site:
    """A site's end of its stream."""

    def __init__(self, channel: Any) -> None:
        self._out: queue.Queue[pb.SiteStatus | None] = queue.Queue()
        self.orders: list[list[str]] = []
        self.error: Any = None
        self.told_at: list[float] = []
        self._call = SiteServiceStub(channel).Connect(iter(self._out.get, None))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def tell(self, **fields: Any) -> None:
        self._out.put(pb.SiteStatus(**fields))

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()
        self._thread.join(5)

    def _listen(self) -> None:
        try:
            for order in self._call:
                self.told_at.append(time.monotonic())
                self.orders.append(list(order.stopped_runs))
        except grpc.RpcError as error:
            self.error = error


@contextmanager
def site(office: Office, name: str) -> Iterator[Site]:
    with office.channel(f"token-of-{name}") as channel:
        found = Site(channel)
        try:
            yield found
        finally:
            found.close()


def test_what_a_site_tells_is_seen_until_it_goes(office: Office) -> None:
    with site(office, "north") as north:
        north.tell(state="training", run="demo", round=2, step=5, steps=9, device="a laptop")
        until(lambda: office.parts.desk.sites()[0].report is not None)
        with office.channel() as channel:
            found = RunServiceStub(channel).ListSites(pb.ListSitesRequest(), timeout=5).sites
        assert [(s.name, s.online) for s in found] == [("north", True), ("south", False)]
        assert (found[0].status.state, found[0].status.step) == ("training", 5)
        assert found[0].last_seen != ""
    until(lambda: not office.parts.desk.sites()[0].online)


def test_a_stop_is_told_at_once_and_a_resumed_run_is_taken_back(office: Office) -> None:
    with site(office, "north") as north, office.channel() as channel:
        until(lambda: north.orders == [[]])
        runs = RunServiceStub(channel)
        text = config().model_dump_json()
        runs.StartRun(pb.StartRunRequest(config_json=text), timeout=10)
        until(lambda: office.flower.started)
        asked = time.monotonic()
        runs.StopRun(pb.RunName(name="demo"), timeout=5)
        until(lambda: len(north.orders) > 1)
        assert north.orders[-1] == ["demo"]
        assert north.told_at[-1] - asked < 1.0
        with site(office, "south") as south:
            until(lambda: south.orders == [["demo"]])
        until(lambda: runs.GetRun(pb.RunName(name="demo"), timeout=5).state == "stopped")
        runs.ResumeRun(pb.RunName(name="demo"), timeout=5)
        until(lambda: north.orders[-1] == [])


def test_an_older_stream_of_a_site_makes_place_for_a_new_one(office: Office) -> None:
    with site(office, "north") as first:
        until(lambda: first.orders)
        with site(office, "north") as second:
            until(lambda: first.error is not None)
            assert first.error.code() == grpc.StatusCode.ABORTED
            second.tell(state="idle")
            until(lambda: office.parts.desk.sites()[0].report is not None)
            assert office.parts.desk.sites()[0].online


def test_a_revoked_site_is_cut_off(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune_server.desk.site_service._LOOK_S", 0.05)
    with site(office, "north") as north:
        until(lambda: north.orders)
        office.registry.known["north"].state = "revoked"
        until(lambda: north.error is not None)
        assert "site north is revoked" in north.error.details()


def test_a_site_that_floods_is_cut_off(office: Office) -> None:
    with site(office, "north") as north:
        for n in range(300):
            north.tell(step=n)
        until(lambda: north.error is not None)
        assert north.error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_operator_is_no_site(office: Office) -> None:
    with office.channel() as channel:
        found = Site(channel)
        until(lambda: found.error is not None)
        assert found.error.code() == grpc.StatusCode.PERMISSION_DENIED
        found.close()


def test_two_hundred_sites_need_no_two_hundred_threads(office: Office) -> None:
    for n in range(200):
        office.registry.add(f"s{n:03}")
    before = threading.active_count()

    async def connect(name: str, counted: asyncio.Semaphore, all_there: asyncio.Event) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        async with grpc.aio.insecure_channel(office.address, options=own) as channel:
            token = (("authorization", f"Bearer token-of-{name}"),)
            call = SiteServiceStub(channel).Connect(metadata=token)
            await call.write(pb.SiteStatus(state="idle"))
            assert list((await call.read()).stopped_runs) == []
            counted.release()
            await all_there.wait()
            call.cancel()

    async def connect_all() -> int:
        counted, all_there = asyncio.Semaphore(0), asyncio.Event()
        sites = [asyncio.create_task(connect(f"s{n:03}", counted, all_there)) for n in range(200)]
        for _ in range(200):
            await counted.acquire()
        threads = threading.active_count()
        online = sum(site.online for site in office.parts.desk.sites())
        all_there.set()
        await asyncio.gather(*sites)
        assert online == 200
        return threads

    assert asyncio.run(asyncio.wait_for(connect_all(), 60)) - before < 50


def test_log_lines_are_kept_and_followed(office: Office) -> None:
    with site(office, "north") as north, office.channel() as channel:
        runs = RunServiceStub(channel)
        north.tell(log_lines=[json.dumps({"message": f"line {n}"}) for n in range(5)])
        until(lambda: len(list(runs.SiteLogs(pb.SiteLogsRequest(site="north"), timeout=5))) == 5)
        stream = runs.SiteLogs(pb.SiteLogsRequest(site="north", tail=2, follow=True), timeout=20)
        assert [json.loads(next(stream).json)["message"] for _ in range(2)] == ["line 3", "line 4"]
        north.tell(log_lines=["\x1b[2Jnot json\n\n"])
        assert json.loads(next(stream).json) == {"message": "[2Jnot json"}
        stream.cancel()
        with pytest.raises(grpc.RpcError, match="no site is called"):
            list(runs.SiteLogs(pb.SiteLogsRequest(site="../x"), timeout=5))


def test_logs_are_bounded(tmp_path: Path) -> None:
    logs = SiteLogs(tmp_path, rotate_bytes=50_000)
    for _ in range(100):
        logs.keep("north", ["x" * 100_000] * 10)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 150_000
    assert len(logs.tail("north", 3)) == 3
    other = SiteLogs(tmp_path / "other")
    for _ in range(100):
        other.keep("south", ["x" * 9000] * 200)
    assert 900_000 < sum(path.stat().st_size for path in (tmp_path / "other").iterdir()) < 1_200_000


def test_a_refusal_is_kept_once(office: Office) -> None:
    with site(office, "north") as north:
        for step in range(3):
            north.tell(state="refusing", step=step, last_refusal="not at this hour")
        until(lambda: office.parts.desk.refusals())
        north.tell(state="refusing", step=9, last_refusal="memory")
        until(lambda: len(office.parts.desk.refusals()) == 2)
    assert [(r.who, r.reason) for r in office.parts.desk.refusals()] == [
        ("north", "memory"),
        ("north", "not at this hour"),
    ]


def test_an_old_refusal_is_no_news_after_a_start_of_the_desk() -> None:
    presence = Presence()
    presence.hear("north", SiteReport(state="idle", last_refusal="not at this hour"))
    assert presence.refusals() == ()
    presence.hear("north", SiteReport(state="refusing", last_refusal="memory"))
    presence.hear("south", SiteReport(state="refusing", last_refusal="not at this hour"))
    assert [(each.who, each.reason) for each in presence.refusals()] == [
        ("south", "not at this hour"),
        ("north", "memory"),
    ]


def test_a_silent_site_is_offline() -> None:
    now = [0.0]
    presence = Presence(now=lambda: now[0])
    presence.hear("north", SiteReport(state="idle"))
    assert presence.look("north")[0] is False  # it has no stream
    now[0] = presence_module.OFFLINE_AFTER_S + 1
    assert presence.look("north")[2] == SiteReport(state="idle")


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        pb.SiteStatus,
        state=st.text(max_size=300),
        last_refusal=st.text(max_size=3000),
        memory_bytes=st.integers(0, 2**64 - 1),
        link_up_bytes_per_s=st.floats(),
        versions=st.dictionaries(st.text(max_size=90), st.text(max_size=90), max_size=50),
        device=st.text(max_size=500),
    )
)
def test_hostile_reports_are_clipped(status: pb.SiteStatus) -> None:
    report = read_report(status)
    assert len(report.state) <= 40
    assert len(report.last_refusal) <= 500
    assert report.memory_bytes < 1 << 63
    assert 0 <= report.link_up_bytes_per_s < 1e15
    assert len(report.versions) <= 32
    texts = (report.state, report.last_refusal, report.device, *report.versions.values())
    assert all(text.isprintable() for text in texts)
