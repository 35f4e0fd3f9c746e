"""The dashboard's routes: one page, its events, and metrics.

    GET  /             the page: a form for the token, or the board
    GET  /page.css, /page.js, and the modules that it imports
    POST /login        the token; answers with a cookie
    POST /logout
    GET  /events       server-sent events: what the page shows, then what changes
    GET  /metrics      Prometheus text; `Authorization: Bearer TOKEN`

There is no route that changes anything but a session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from fedtune.errors import FedtuneError
from fedtune_server.dashboard.feed import LEAST_S, Feed
from fedtune_server.dashboard.guard import not_cross_site, same_origin
from fedtune_server.dashboard.login import SESSION_S, Attempts, Doorkeeper

MOST_STREAMS = 16
SCRIPTS = ("page.js", "elements.js", "fleet.js", "pictures.js")
_BEAT_S = 15.0
_MOST_LOGIN_BYTES = 4096
_LOGIN_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes need.

    Attributes:
        metrics: the text for Prometheus, made at each call.
        over: whether the server is stopping.
        secure: the cookie is sent over TLS alone; off where the dashboard is plaintext.
    """

    feed: Feed
    door: Doorkeeper
    metrics: Callable[[], bytes]
    over: Callable[[], bool]
    secure: bool = True
    attempts: Attempts | None = None
    poll_s: float = LEAST_S
    most_streams: int = MOST_STREAMS


def make_app(given: Parts) -> FastAPI:
    """The dashboard as an ASGI app; `guard.Guard` belongs around it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(given)
    for name in SCRIPTS:
        app.add_api_route(f"/{name}", _script(name), methods=["GET"], response_model=None)
    for method, path, answer in (
        ("GET", "/", routes.page),
        ("GET", "/page.css", routes.style),
        ("POST", "/login", routes.login),
        ("POST", "/logout", routes.logout),
        ("GET", "/events", routes.events),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/favicon.ico", routes.no_icon),
    ):
        app.add_api_route(path, answer, methods=[method], response_model=None)
    return app


class _Routes:
    def __init__(self, given: Parts) -> None:
        self._given = given
        self._attempts = given.attempts or Attempts()
        self._cookie = "__Host-fedtune" if given.secure else "fedtune"
        self._streams = 0
        self._page, self._style = _packaged("page.html"), _packaged("page.css")

    # ---------------------------------------------------------------- files

    async def page(self, request: Request) -> Response:
        return self._page_with("board" if self._is_in(request) else "login")

    async def style(self) -> Response:
        return Response(self._style, media_type="text/css")

    async def no_icon(self) -> Response:
        return Response(status_code=204)

    def _page_with(self, shown: str, message: str = "", status: int = 200) -> Response:
        """The page with one of its two halves; `message` is one of ours."""
        text = self._page.replace("{shown}", shown).replace("{message}", message)
        return Response(text, status, media_type="text/html")

    # ---------------------------------------------------------------- sessions

    async def login(self, request: Request) -> Response:
        if not same_origin(request.headers):
            return PlainTextResponse("sign in from the dashboard's own page\n", 403)
        peer = request.client.host if request.client else ""
        wait_s = self._attempts.wait_s(peer)
        if wait_s > 0:
            answer = self._page_with("login", "Too many wrong tokens. Wait a minute.", 429)
            answer.headers["Retry-After"] = f"{wait_s + 1:.0f}"
            return answer
        body = await _body(request)
        token = _field(body, "token") if body is not None else ""
        cookie = await asyncio.to_thread(self._given.door.sign_in, token)
        if cookie is None:
            self._attempts.wrong(peer)
            _log.warning("dashboard: a wrong token from %s", peer)
            message = "That is not the token. It is in operator.toml, or in dashboard.token."
            return self._page_with("login", message, 403)
        answer = RedirectResponse("/", 303)
        self._set_cookie(answer, cookie, SESSION_S)
        return answer

    async def logout(self, request: Request) -> Response:
        if not same_origin(request.headers):
            return PlainTextResponse("sign out from the dashboard's own page\n", 403)
        self._given.door.sign_out(request.cookies.get(self._cookie, ""))
        answer = RedirectResponse("/", 303)
        self._set_cookie(answer, "", 0)
        return answer

    def _set_cookie(self, answer: Response, value: str, seconds: int) -> None:
        answer.set_cookie(
            self._cookie,
            value,
            max_age=seconds,
            path="/",
            secure=self._given.secure,
            httponly=True,
            samesite="strict",
        )

    def _is_in(self, request: Request) -> bool:
        return self._given.door.knows(request.cookies.get(self._cookie, ""))

    # ---------------------------------------------------------------- data

    async def events(self, request: Request, run: str = "") -> Response:
        if not not_cross_site(request.headers):
            return PlainTextResponse("other sites may not ask\n", 403)
        if not self._is_in(request):
            return PlainTextResponse("sign in first\n", 401)
        if self._streams >= self._given.most_streams:
            text = f"{self._streams} pages are open, which is all there may be\n"
            return PlainTextResponse(text, 503, {"Retry-After": "30"})
        stream = self._stream(request, run[:100], request.headers.get("last-event-id", ""))
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    async def _stream(self, request: Request, run: str, seen: str) -> AsyncIterator[str]:
        self._streams += 1
        try:
            yield "retry: 3000\n\n"
            sent_at = time.monotonic()
            while not self._given.over():
                if not self._is_in(request):
                    yield "event: ended\ndata: the session is over\n\n"
                    return
                text = await asyncio.to_thread(self._news, run, seen)
                if text:
                    seen, sent_at = text[0], time.monotonic()
                    yield text[1]
                elif time.monotonic() - sent_at >= _BEAT_S:
                    sent_at = time.monotonic()
                    yield "event: beat\ndata: {}\n\n"
                await asyncio.sleep(self._given.poll_s)
        finally:
            self._streams -= 1

    def _news(self, run: str, seen: str) -> tuple[str, str] | None:
        """The id and the text of an event, if there is something new."""
        try:
            change = self._given.feed.since(run, seen)
        except FedtuneError as error:
            _log.warning("dashboard: %s", error)
            return None
        if change.id == seen:
            return None
        return change.id, f"id: {change.id}\nevent: change\ndata: {change.json()}\n\n"

    async def metrics(self, request: Request) -> Response:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        peer = request.client.host if request.client else ""
        if self._attempts.wait_s(peer) > 0:
            return PlainTextResponse("too many wrong tokens; wait a minute\n", 429)
        if scheme.lower() != "bearer" or not self._given.door.accepts(token.strip()):
            if token:
                self._attempts.wrong(peer)
            answer = PlainTextResponse("send `Authorization: Bearer TOKEN`\n", 401)
            answer.headers["WWW-Authenticate"] = 'Bearer realm="fedtune"'
            return answer
        text = await asyncio.to_thread(self._given.metrics)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _script(name: str) -> Callable[[], Awaitable[Response]]:
    text = _packaged(name)

    async def script() -> Response:
        return Response(text, media_type="text/javascript")

    return script


def _packaged(name: str) -> str:
    return resources.files("fedtune_server.dashboard").joinpath(name).read_text(encoding="utf-8")


async def _body(request: Request) -> bytes | None:
    """The body of a short request; None if it is longer, or does not come."""
    body = b""
    try:
        async with asyncio.timeout(_LOGIN_S):
            async for part in request.stream():
                body += part
                if len(body) > _MOST_LOGIN_BYTES:
                    return None
    except TimeoutError:
        return None
    return body


def _field(body: bytes, name: str) -> str:
    try:
        found = parse_qs(body.decode("ascii"), max_num_fields=4)
    except ValueError:
        return ""
    return next(iter(found.get(name, [])), "").strip()
