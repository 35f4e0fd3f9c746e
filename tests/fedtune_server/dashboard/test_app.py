"""The routes: what is answered to whom, with which headers, and how events look."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from fedtune.errors import RunError
from fedtune_server.dashboard.app import SCRIPTS, Parts, make_app
from fedtune_server.dashboard.feed import Readings, page_feed
from fedtune_server.dashboard.guard import Guard
from fedtune_server.dashboard.login import Attempts, Doorkeeper
from fedtune_server.dashboard.metrics import metrics_text

from .conftest import HOSTILE, TOKEN, FakeDesk

BASE = "https://coordinator.test:9402"
OWN = {"origin": BASE}
DATA = ("spring", "north", "round_started", "Linux, 8 cores")

SCRIPT_PATHS = [f"/{name}" for name in SCRIPTS]


class Client:
    """Asks an app, as a browser that keeps cookies and follows nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self.cookies = app, httpx.Cookies()

    def request(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, client=("203.0.113.7", 50_000))
            async with httpx.AsyncClient(
                transport=transport, base_url=BASE, cookies=self.cookies
            ) as client:
                answer = await client.request(method, path, **content)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())

    def get(self, path: str, **content: Any) -> httpx.Response:
        return self.request("GET", path, **content)

    def post(self, path: str, **content: Any) -> httpx.Response:
        return self.request("POST", path, **content)


class Server:
    """A client, and a stream that ends after so many looks."""

    def __init__(self, desk: FakeDesk, *, secure: bool = True, most_streams: int = 16) -> None:
        self.looks_left = 2
        readings = Readings(desk, Path("no.crt"), Path("no.json"))
        parts = Parts(
            page_feed(readings),
            Doorkeeper(lambda: (TOKEN,)),
            lambda: metrics_text(readings),
            self._over,
            secure=secure,
            attempts=Attempts(),
            poll_s=0.0,
            most_streams=most_streams,
        )
        app = Guard(make_app(parts), ["coordinator.test"])
        self.client = Client(app)

    def _over(self) -> bool:
        self.looks_left -= 1
        return self.looks_left < 0

    def sign_in(self) -> None:
        answer = self.client.post("/login", data={"token": TOKEN}, headers=OWN)
        assert answer.status_code == 303


@pytest.fixture
def server(told: FakeDesk) -> Server:
    return Server(told)


def events(text: str) -> list[dict[str, str]]:
    """The events of a stream, each as its fields."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block]
    return [dict(line.split(": ", 1) for line in block) for block in blocks]  # type: ignore[misc]


# ---------------------------------------------------------------- who sees what


def test_without_a_session_there_is_a_form_and_no_data(server: Server) -> None:
    page = server.client.get("/")
    assert page.status_code == 200
    assert '<body class="login">' in page.text
    for path in ("/", "/page.js", "/page.css", "/events", "/metrics", "/runs", "/openapi.json"):
        text = server.client.get(path).text
        assert not [word for word in (*DATA, TOKEN, HOSTILE) if word in text], path
    assert server.client.get("/events").status_code == 401
    assert server.client.get("/metrics").status_code == 401
    assert server.client.get("/openapi.json").status_code == 404


def test_the_token_is_exchanged_for_a_cookie_that_scripts_do_not_see(server: Server) -> None:
    answer = server.client.post("/login", data={"token": TOKEN}, headers=OWN)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-fedtune=")
    for attribute in ("HttpOnly", "Secure", "SameSite=strict", "Path=/", "Max-Age=43200"):
        assert attribute in cookie
    assert "domain" not in cookie.lower()
    assert TOKEN not in cookie
    assert '<body class="board">' in server.client.get("/").text


def test_a_plaintext_dashboard_has_a_cookie_that_plaintext_carries(told: FakeDesk) -> None:
    server = Server(told, secure=False)
    answer = server.client.post("/login", data={"token": TOKEN}, headers=OWN)
    assert answer.headers["set-cookie"].startswith("fedtune=")
    assert "Secure" not in answer.headers["set-cookie"]


def test_signing_out_ends_the_session_and_not_only_the_cookie(server: Server) -> None:
    server.sign_in()
    cookies = httpx.Cookies(server.client.cookies)
    assert server.client.post("/logout", headers=OWN).status_code == 303
    assert not server.client.cookies
    server.client.cookies = cookies
    assert server.client.get("/events").status_code == 401


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", "%00", "é" * 100, "x" * 10_000])
def test_a_wrong_token_is_told_and_gives_no_cookie(server: Server, token: str) -> None:
    answer = server.client.post("/login", data={"token": token}, headers=OWN)
    assert answer.status_code == 403
    assert "That is not the token." in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "body", [b"", b"token", b"a=1&" * 300, b"\xff\xfe", b"token=" + TOKEN.encode() + b"&x=" * 9]
)
def test_a_body_that_is_no_form_is_a_wrong_token(server: Server, body: bytes) -> None:
    assert server.client.post("/login", content=body, headers=OWN).status_code == 403


def test_a_body_that_is_too_long_is_not_read_even_with_the_token(server: Server) -> None:
    body = b"token=" + TOKEN.encode() + b"&x=" + b"x" * 5000
    assert server.client.post("/login", content=body, headers=OWN).status_code == 403


def test_the_sixth_wrong_token_waits_a_minute_and_so_does_the_right_one(server: Server) -> None:
    for _ in range(5):
        assert server.client.post("/login", data={"token": "x"}, headers=OWN).status_code == 403
    answer = server.client.post("/login", data={"token": TOKEN}, headers=OWN)
    assert answer.status_code == 429
    assert 55 <= int(answer.headers["retry-after"]) <= 61
    assert server.client.get("/metrics", headers=_bearer(TOKEN)).status_code == 429


# ---------------------------------------------------------------- from where


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "null"},
        {"origin": "https://evil.test"},
        {"origin": "https://coordinator.test"},  # another port is another origin
        {"origin": BASE, "sec-fetch-site": "cross-site"},
        {"origin": BASE, "sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/login", "/logout"])
def test_posts_of_other_pages_are_refused(
    server: Server, path: str, headers: dict[str, str]
) -> None:
    answer = server.client.post(path, data={"token": TOKEN}, headers=headers)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_events_are_not_told_to_other_sites(server: Server) -> None:
    server.sign_in()
    answer = server.client.get("/events", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("coordinator.test:9402", 200),
        ("COORDINATOR.test", 200),
        ("localhost:9402", 200),
        ("127.0.0.1:9402", 200),
        ("[::1]:9402", 200),
        ("evil.test", 421),
        ("coordinator.test.evil.test", 421),
        ("", 421),
    ],
)
def test_only_its_own_names_and_addresses_reach_it(server: Server, host: str, status: int) -> None:
    assert server.client.get("/", headers={"host": host}).status_code == status


def test_every_answer_forbids_foreign_content_framing_and_storing(server: Server) -> None:
    for path in (
        "/",
        "/page.css",
        *SCRIPT_PATHS,
        "/events",
        "/metrics",
        "/nothing",
        "/favicon.ico",
    ):
        headers = server.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_has_no_inline_code_and_no_foreign_address(server: Server) -> None:
    text = "".join(server.client.get(path).text for path in ("/", "/page.css", *SCRIPT_PATHS))
    for forbidden in ("innerHTML", "style=", " onclick", " onload", "eval(", "@import"):
        assert forbidden not in text
    foreign = text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in foreign
    assert "https:" not in foreign


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
def test_nothing_but_a_session_can_be_changed(server: Server, method: str) -> None:
    server.sign_in()
    for path in ("/", "/events", "/metrics"):
        assert server.client.request(method, path, headers=OWN).status_code == 405


# ---------------------------------------------------------------- events


def test_a_stream_begins_with_the_whole_page(server: Server) -> None:
    server.sign_in()
    answer = server.client.get("/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, second, *rest = events(answer.text)
    assert first == {"retry": "3000"}
    assert second["event"] == "change"
    data = json.loads(second["data"])
    assert data["whole"]
    assert data["parts"]["head"]["name"] == "spring"
    assert rest == []  # the second look found nothing new


def test_a_stream_that_comes_back_gets_what_it_lacks(server: Server, told: FakeDesk) -> None:
    server.sign_in()
    seen = events(server.client.get("/events").text)[1]["id"]
    server.looks_left = 1
    assert events(server.client.get("/events", headers={"last-event-id": seen}).text)[1:] == []
    server.looks_left = 1
    lost = events(server.client.get("/events", headers={"last-event-id": "0-0"}).text)
    assert json.loads(lost[1]["data"])["whole"]


def test_a_stream_may_be_of_another_run(server: Server) -> None:
    server.sign_in()
    found = events(server.client.get("/events?run=autumn").text)
    assert json.loads(found[1]["data"])["parts"]["head"]["name"] == "autumn"


def test_names_and_reasons_travel_as_data_on_one_line(server: Server, told: FakeDesk) -> None:
    told.tell("spring", "warning", 340, text="a\n\nevent: ended\ndata: x\r\n\u2028")
    server.sign_in()
    found = events(server.client.get("/events").text)
    assert [each.get("event") for each in found] == [None, "change"]
    assert HOSTILE in json.loads(found[1]["data"])["parts"]["fleet"]["order"]


def test_there_are_only_so_many_streams(told: FakeDesk) -> None:
    server = Server(told, most_streams=0)
    server.sign_in()
    answer = server.client.get("/events")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "30"


def test_a_stream_that_ended_makes_room(told: FakeDesk) -> None:
    server = Server(told, most_streams=1)
    server.sign_in()
    for _ in range(3):
        server.looks_left = 1
        assert server.client.get("/events").status_code == 200


def test_a_stream_ends_when_its_session_does(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.sign_in()
    server.looks_left = 100
    answers = iter((True, True, False))
    monkeypatch.setattr(Doorkeeper, "knows", lambda self, cookie: next(answers))
    assert events(server.client.get("/events").text)[-1]["event"] == "ended"


def test_a_run_that_cannot_be_looked_at_does_not_end_the_stream(
    server: Server, told: FakeDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:  # a desk that is being started again
        raise RunError("not now")

    server.sign_in()
    monkeypatch.setattr(told, "runs", broken)
    assert events(server.client.get("/events").text) == [{"retry": "3000"}]


# ---------------------------------------------------------------- metrics


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_metrics_need_the_token_and_a_session_is_not_enough(server: Server) -> None:
    server.sign_in()
    assert server.client.get("/metrics").status_code == 401
    assert server.client.get("/metrics", headers=_bearer("wrong")).status_code == 401
    answer = server.client.get("/metrics", headers=_bearer(TOKEN))
    assert answer.status_code == 200
    assert 'fedtune_run_round{run="spring"} 2.0' in answer.text
