"""The dashboard over HTTPS: it starts, stops with pages open, and takes a new certificate."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.errors import DeploymentError
from fedtune_server.dashboard import serving
from fedtune_server.dashboard.feed import Readings
from fedtune_server.dashboard.serving import Dashboard

from .conftest import TOKEN, FakeDesk


def serve(
    desk: FakeDesk, settings: ServerSettings, home: CoordinatorHome, *, insecure: bool = False
) -> Dashboard:
    readings = Readings(desk, home.certificate, home.logs / "supervisor.json")
    return serving.serve(readings, settings, home, insecure=insecure)


def settings(port: int) -> ServerSettings:
    return ServerSettings(host="localhost", bind="127.0.0.1", dashboard_port=port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def dashboard(told: FakeDesk, home: CoordinatorHome) -> Iterator[Dashboard]:
    made = serve(told, settings(free_port()), home)
    yield made
    made.stop()


@pytest.fixture
def client(dashboard: Dashboard, home: CoordinatorHome) -> Iterator[httpx.Client]:
    trust = ssl.create_default_context(cafile=str(home.certificate))
    with httpx.Client(verify=trust, base_url=dashboard.address, timeout=10) as made:
        yield made


def sign_in(client: httpx.Client, dashboard: Dashboard) -> None:
    own = {"origin": dashboard.address.rstrip("/")}
    assert client.post("/login", data={"token": TOKEN}, headers=own).status_code == 303


def test_it_answers_over_tls_and_not_in_plaintext(
    dashboard: Dashboard, client: httpx.Client
) -> None:
    assert '<body class="login">' in client.get("/").text
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{dashboard.port}/", timeout=5)


def test_it_stops_within_seconds_although_a_page_is_open(
    dashboard: Dashboard, client: httpx.Client
) -> None:
    sign_in(client, dashboard)
    with client.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event")) == "event: change"
        began = time.monotonic()
        dashboard.stop()
        assert time.monotonic() - began < 5
        assert [line for line in lines if line.startswith("event")] == []
    with pytest.raises(httpx.ConnectError):
        client.get("/")


def test_news_come_within_seconds(
    dashboard: Dashboard, client: httpx.Client, told: FakeDesk
) -> None:
    sign_in(client, dashboard)
    with client.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("data"))
        told.tell("spring", "warning", 341, text="a new line")
        began = time.monotonic()
        news = next(line for line in lines if line.startswith("data"))
        assert time.monotonic() - began < 5
        assert "a new line" in news
        assert '"whole":false' in news


def test_a_renewed_certificate_is_used_without_a_restart(
    dashboard: Dashboard, home: CoordinatorHome, renew: Callable[[float], None]
) -> None:
    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", dashboard.port), timeout=5)

    before = shown()
    renew(90)
    dashboard._server._look_at = 0.0  # type: ignore[attr-defined]  # it looks every half minute
    until = time.monotonic() + 5
    while shown() == before and time.monotonic() < until:
        time.sleep(0.1)
    assert shown().split() == home.certificate.read_text(encoding="utf-8").split()


def test_a_taken_port_is_named(told: FakeDesk, home: CoordinatorHome) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(DeploymentError, match=rf"127\.0\.0\.1:{port} .*dashboard_port"):
            serve(told, settings(port), home)


def test_it_does_not_start_without_token_or_certificate(
    told: FakeDesk, home: CoordinatorHome
) -> None:
    home.certificate.unlink()
    with pytest.raises(DeploymentError, match=r"cannot use .*server\.crt.*fedtune server init"):
        serve(told, settings(free_port()), home)
    home.operator_file.unlink()
    with pytest.raises(DeploymentError, match="needs a token"):
        serve(told, settings(free_port()), home)


def test_a_plaintext_dashboard_warns(
    told: FakeDesk, home: CoordinatorHome, caplog: pytest.LogCaptureFixture
) -> None:
    made = serve(told, settings(free_port()), home, insecure=True)
    try:
        assert httpx.get(made.address, timeout=5).status_code == 200
    finally:
        made.stop()
    assert "INSECURE" in caplog.text
