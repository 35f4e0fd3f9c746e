"""A site's stream to its coordinator, over real gRPC on loopback."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from fedtune.errors import StoppedError
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import SiteServiceServicer, add_SiteServiceServicer_to_server
from fedtune_client.presence import Presence
from fedtune_client.standing import LogTail, StandingBoard
from fedtune_client.stopping import UNWATCHED, Stop


class Service(SiteServiceServicer):  # type: ignore[misc]  # generated, without types
    """Keeps what sites say; sends orders that a test puts in."""

    def __init__(self) -> None:
        self.heard: list[pb.SiteStatus] = []
        self.orders: queue.Queue[pb.SiteOrder | None] = queue.Queue()

    def Connect(self, requests: Any, context: Any) -> Iterator[pb.SiteOrder]:
        def listen() -> None:
            try:
                for status in requests:
                    self.heard.append(status)
            except grpc.RpcError:
                return

        threading.Thread(target=listen, daemon=True).start()
        while context.is_active():
            try:
                order = self.orders.get(timeout=0.05)
            except queue.Empty:
                continue
            if order is None:
                return
            yield order


class Served:
    def __init__(self, service: Service, port: int = 0) -> None:
        self.server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        add_SiteServiceServicer_to_server(service, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def served(service: Service) -> Iterator[Served]:
    served = Served(service)
    yield served
    served.stop()


class Site:
    def __init__(self, port: int, period_s: float = 0.1) -> None:
        self.board, self.stop = StandingBoard(), Stop()
        self.presence = Presence(
            lambda: grpc.insecure_channel(f"127.0.0.1:{port}"),
            lambda: pb.SiteStatus(state=self.board.now().state, step=self.board.now().step),
            self.board,
            self.stop,
            period_s,
        )
        self.presence.start()

    def stopped(self, run: str) -> bool:
        try:
            self.stop.check(run)
        except StoppedError:
            return True
        return False


@pytest.fixture
def site(served: Served) -> Iterator[Site]:
    site = Site(served.port)
    yield site
    site.presence.close()


def wait_for(condition: Callable[[], bool], most_s: float = 15.0) -> None:
    ends = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)


def test_a_site_tells_of_itself_and_of_changes(service: Service, site: Site) -> None:
    wait_for(lambda: len(service.heard) >= 2)
    site.board.change(state="training", step=7)
    wait_for(lambda: service.heard[-1].step == 7)
    assert service.heard[0].state == "idle"
    assert service.heard[-1].state == "training"
    site.presence.close()
    assert not site.presence._thread.is_alive()


def test_an_order_holds_until_the_next_one(service: Service, site: Site) -> None:
    service.orders.put(pb.SiteOrder(stopped_runs=["one", "two"]))
    wait_for(lambda: site.stopped("two"))
    assert not site.stopped("three")
    service.orders.put(pb.SiteOrder(stopped_runs=["one"]))
    wait_for(lambda: not site.stopped("two"))
    assert site.stopped("one")


def test_a_coordinator_that_comes_back_is_found_again(service: Service, served: Served) -> None:
    site = Site(served.port)
    try:
        service.orders.put(pb.SiteOrder(stopped_runs=["one"]))
        wait_for(lambda: site.stopped("one"))
        served.stop()
        # A list from before says nothing of a run that is resumed meanwhile.
        wait_for(lambda: not site.stopped("one"))
        service.heard.clear()
        again = Served(service, served.port)
        try:
            wait_for(lambda: bool(service.heard))
        finally:
            again.stop()
    finally:
        site.presence.close()


def test_a_stream_that_the_coordinator_ends_is_opened_again(service: Service, site: Site) -> None:
    wait_for(lambda: bool(service.heard))
    service.heard.clear()
    service.orders.put(None)
    wait_for(lambda: bool(service.heard))


def test_without_a_coordinator_it_waits_and_ends_at_once(caplog: pytest.LogCaptureFixture) -> None:
    site = Site(1)
    wait_for(lambda: "no presence at the coordinator" in caplog.text)
    begun = time.monotonic()
    site.presence.close()
    assert time.monotonic() - begun < 1.5
    assert not site.presence._thread.is_alive()


def test_a_token_that_cannot_be_read_is_logged_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def connect() -> Any:
        raise OSError("token: no such file")

    presence = Presence(connect, pb.SiteStatus, StandingBoard(), Stop())
    presence.start()
    wait_for(lambda: "token: no such file" in caplog.text)
    presence.close()
    assert not presence._thread.is_alive()


def test_a_log_that_nobody_reads_is_bounded() -> None:
    tail = LogTail()
    logger = logging.getLogger("test_a_log_that_nobody_reads")
    logger.propagate = False
    logger.addHandler(tail)
    for index in range(2000):
        logger.warning("%d %s", index, "x" * 10_000)
    lines = tail.take(10_000)
    assert len(lines) == 500
    assert max(map(len, lines)) < 5000
    assert '"message": "1500 xxx' in lines[0]
    assert tail.take() == []


def test_nobody_watches_a_simulated_agent() -> None:
    UNWATCHED.check()
    UNWATCHED.step(1)
