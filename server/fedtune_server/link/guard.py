"""Stands before Flower's link and lets through what is allowed, by an exact list; nothing else.

Flower's own control API asks for no credentials and shares its port with the devices' API. The
paths are compared as they came over the network: encoded, doubled or dotted ones match nothing.
A body is read whole, up to its limit, before Flower sees the request, so that it never begins work
on one that is too large or never ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fedtune.flwr_compat import PUBLIC_KEY_HEADER
from fedtune_server.link.credentials import Sites, bearer, signed_by
from fedtune_server.link.echo import MOST_BYTES as MOST_ECHO_BYTES
from fedtune_server.link.limits import RateLimit
from fedtune_server.link.pace import HEADER, Pace
from fedtune_server.operator_token import OperatorToken

Scope: TypeAlias = Any  # ASGI's dict of a request
Message: TypeAlias = Any  # ASGI's dict of an event
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Hook: TypeAlias = Callable[[Scope], Awaitable[int | None]]
"""Called before a request that is let through; returns a status to answer with instead, or None."""

REASON_HEADER = "fedtune-refusal"
"""Of an answer of this guard: what kind of refusal it is, for a program."""
SESSION_HEADER = "fedtune-session"
"""Of a site's request: which process of the site it comes from."""

BODY_S = 300.0
"""How long a body may take: 5 MB, Flower's largest piece, over 0.15 Mbit/s."""
STRANGER_BYTES, STRANGER_S = 65_536, 20.0
"""The same of who shows nothing: 2000 connections of such are 130 MB."""
HEALTH = "/health"
ACTIVATE = "/v1/fleet/activate-node"
PULL = "/v1/fleet/pull-messages"

_LOG_PER_S, _LOG_BURST = 2.0, 100
_log = logging.getLogger("fedtune.link")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is given instead of Flower's.

    Attributes:
        kind: for a program: `path`, `method`, `credentials`, `site`, `signature`,
            `superseded`, `rate`, `body`.
        reason: for a person.
    """

    status: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request that is let through comes from."""

    kind: Literal["site", "operator", "peer"]
    name: str


@dataclass(frozen=True, slots=True)
class Doors:
    """The exact paths, by who may enter.

    Attributes:
        fleet: of devices, signed by a registered key.
        operator: with the operator's token.
        public: for everybody; of an app of ours, which checks for itself.
        tokened: of an app of ours, with a site's token.
    """

    fleet: frozenset[str]
    operator: frozenset[str]
    public: frozenset[str] = frozenset()
    tokened: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one caller may ask; see `LimitsSection`."""

    requests_per_s: float = 50.0
    burst: int = 400
    body_bytes: int = 16_000_000


@dataclass(slots=True)
class _Seen:
    """What the guard keeps of callers."""

    sites: RateLimit
    peers: RateLimit
    log: RateLimit
    sessions: dict[str, str] = field(default_factory=dict)  # by public key, as in the header
    silent: int = 0


class Guard:
    """The ASGI app that a server serves.

    Args:
        flower: Flower's link.
        ours: answers the paths of `doors.public` and `doors.tokened`.
        hook: for tests that inject faults.
    """

    def __init__(
        self,
        flower: App,
        ours: App,
        doors: Doors,
        sites: Sites,
        operator: OperatorToken,
        bounds: Bounds,
        hook: Hook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flower = flower
        self._ours = ours
        self._doors = doors
        self._sites = sites
        self._operator = operator
        self._bounds = bounds
        self._hook = hook
        rates = (bounds.requests_per_s, bounds.burst, clock)
        self._pace = Pace(clock)
        self._seen = _Seen(
            RateLimit(*rates), RateLimit(*rates), RateLimit(_LOG_PER_S, _LOG_BURST, clock)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._flower(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets: the server closes what is not accepted
            return
        headers = header_map(scope)
        found = self._admit(scope, headers)
        if isinstance(found, Caller) and not self._may_spend(found):
            found = Refusal(429, "rate", "too many requests; ask again later")
        if isinstance(found, Refusal):
            # Who may enter is let in all the same: behind a proxy, all may share one address.
            if self._seen.peers.is_empty(_peer(scope)):
                found = Refusal(429, "rate", "too many refused requests; ask again later")
            await self._refuse(scope, send, found)
        else:
            await self._serve(scope, headers, receive, send, found)

    async def _serve(
        self,
        scope: Scope,
        headers: Mapping[str, str],
        receive: Receive,
        send: Send,
        caller: Caller,
    ) -> None:
        body = await self._body(scope["path"], headers, receive)
        if body is None:  # the caller is gone
            return
        if isinstance(body, Refusal):
            await self._refuse(scope, send, body)
            return
        if self._hook is not None and (status := await self._hook(scope)) is not None:
            await _answer(send, status, "an injected fault", {})
            return
        path = scope["path"]
        app = self._ours if path in self._doors.public | self._doors.tokened else self._flower
        if path == ACTIVATE:
            send = self._adopting(headers, send)
        if path == PULL and caller.kind == "site":
            send = _pacing(send, self._pace.poll_s(caller.name))
        await app(scope, _replay(body, receive), send)

    # ------------------------------------------------------------ who may enter

    def _admit(self, scope: Scope, headers: Mapping[str, str]) -> Caller | Refusal:
        peer, path = _peer(scope), scope["path"]
        if scope.get("raw_path", path.encode()) != path.encode() or not path.isascii():
            return Refusal(404, "path", "there is nothing here")
        if path == HEALTH or path in self._doors.public:
            return Caller("peer", peer)
        if path in self._doors.tokened:
            return self._admit_token(headers)
        if scope["method"] != "POST":
            return Refusal(405, "method", "there is nothing here")
        if path in self._doors.fleet:
            return self._admit_site(path, headers)
        if path in self._doors.operator:
            return self._admit_operator(headers)
        return Refusal(404, "path", "there is nothing here")

    def _admit_site(self, path: str, headers: Mapping[str, str]) -> Caller | Refusal:
        name, reason = signed_by(headers, self._sites)
        if not name:
            return Refusal(403, "site", reason)
        if reason:  # 503, because the site is to try again, by the time that this answer tells
            return Refusal(503, "signature", reason)
        key, session = headers[PUBLIC_KEY_HEADER], headers.get(SESSION_HEADER, "")
        kept = self._seen.sessions.get(key, session)
        if kept != session and path != ACTIVATE:
            return Refusal(
                403, "superseded", f"another process with the key of {name} has taken over"
            )
        return Caller("site", name)

    def _admit_operator(self, headers: Mapping[str, str]) -> Caller | Refusal:
        # No peer is trusted for its address: every user of this machine, and every proxy or tunnel
        # that ends here, comes from loopback.
        if self._operator.matches(bearer(headers)):
            return Caller("operator", "operator")
        return Refusal(401, "credentials", "this needs the operator's token")

    def _admit_token(self, headers: Mapping[str, str]) -> Caller | Refusal:
        token = bearer(headers)
        site = self._sites.by_token(token) if token else None
        if site is not None and site.state == "enrolled":
            return Caller("site", site.name)
        if self._operator.matches(bearer(headers)):
            return Caller("operator", "operator")
        return Refusal(401, "credentials", "this needs a site's token")

    def _may_spend(self, caller: Caller) -> bool:
        """An operator's processes on this machine ask as often as they need."""
        if caller.kind == "operator":
            return True
        rates = self._seen.sites if caller.kind == "site" else self._seen.peers
        return rates.spend(caller.name)

    def _adopting(self, headers: Mapping[str, str], send: Send) -> Send:
        """Keep the session of an activation that Flower has granted."""

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                session = headers.get(SESSION_HEADER, "")
                self._seen.sessions[headers[PUBLIC_KEY_HEADER]] = session
            await send(message)

        return watching

    # ------------------------------------------------------------ bodies and answers

    async def _body(
        self, path: str, headers: Mapping[str, str], receive: Receive
    ) -> bytes | Refusal | None:
        most, seconds = self._bounds.body_bytes, BODY_S
        if path == HEALTH or path in self._doors.public:
            most, seconds = min(most, STRANGER_BYTES), STRANGER_S
        elif path in self._doors.tokened:
            most = min(most, MOST_ECHO_BYTES)
        too_large = Refusal(413, "body", f"a body may hold at most {most} bytes")
        said = headers.get("content-length", "0")
        if not (said.isascii() and said.isdigit() and len(said) <= 18):
            return Refusal(400, "body", "content-length is not a number")
        if int(said) > most:
            return too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return Refusal(408, "body", f"the body took longer than {seconds:.0f} s")

    async def _refuse(self, scope: Scope, send: Send, refusal: Refusal) -> None:
        peer = _peer(scope)
        self._seen.peers.spend(peer)
        self._log_refusal(scope, peer, refusal)
        headers = {REASON_HEADER: refusal.kind, "connection": "close"}
        if refusal.status == 429:
            headers["retry-after"] = "1"
        await _answer(send, refusal.status, refusal.reason, headers)

    def _log_refusal(self, scope: Scope, peer: str, refusal: Refusal) -> None:
        if not self._seen.log.spend("refusals"):
            self._seen.silent += 1
            return
        fields = {
            "peer": peer,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": refusal.status,
            "kind": refusal.kind,
            "reason": refusal.reason,
            "not_logged_before": self._seen.silent,
        }
        self._seen.silent = 0
        _log.warning("refused %s", json.dumps(fields), extra={"fields": fields})


def header_map(scope: Scope) -> dict[str, str]:
    """The headers of a request; of one that is given twice none counts."""
    found: dict[str, str] = {}
    twice: set[str] = set()
    for raw_name, raw_value in scope["headers"]:
        name = raw_name.decode("latin-1").lower()
        if name in found:
            twice.add(name)
        found[name] = raw_value.decode("latin-1")
    return {name: value for name, value in found.items() if name not in twice}


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _pacing(send: Send, poll_s: float) -> Send:
    """Say with an answer when to ask again."""

    async def saying(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (HEADER.encode(), f"{poll_s:.2f}".encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return saying


async def _answer(send: Send, status: int, text: str, headers: Mapping[str, str]) -> None:
    content = text.encode("utf-8", "replace")
    every = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(content)),
        **headers,
    }
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in every.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
