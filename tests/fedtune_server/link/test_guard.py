"""Who gets past the guard, without a network and without Flower behind it."""

from __future__ import annotations

import asyncio
import datetime
import logging
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.flwr_compat import PUBLIC_KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER
from fedtune_server.link import guard as module
from fedtune_server.link.guard import (
    ACTIVATE,
    REASON_HEADER,
    SESSION_HEADER,
    Bounds,
    Doors,
    Guard,
    Hook,
)
from fedtune_server.link.pace import HEADER, LEAST_S
from fedtune_server.operator_token import OperatorToken
from tests.deployment.homes import public_pem

PULL = "/v1/fleet/pull-messages"
LIST_RUNS = "/v1/control/list-runs"
ACQUIRE = "/v1/runtime/acquire-task"
JOIN, ECHO = "/fedtune/v1/join", "/fedtune/v1/echo"
DOORS = Doors(
    fleet=frozenset({PULL, ACTIVATE}),
    operator=frozenset({LIST_RUNS, ACQUIRE}),
    public=frozenset({JOIN}),
    tokened=frozenset({ECHO}),
)
KEY = ec.generate_private_key(ec.SECP384R1())
TOKEN = {"authorization": "Bearer the-operators-token"}


@dataclass(frozen=True)
class OneSite:
    name: str
    state: str
    key: bytes

    def by_public_key(self, key: bytes) -> OneSite | None:
        return self if key == self.key else None

    def by_token(self, token: str) -> OneSite | None:
        return self if token == "the-sites-token" else None

    def set_node(self, name: str, node_id: int) -> None:
        return


NORTH = OneSite("north", "enrolled", public_pem(KEY).encode())


@pytest.fixture
def operator(tmp_path: Path) -> OperatorToken:
    path = tmp_path / "operator.toml"
    path.write_text('token = "the-operators-token"\n', encoding="utf-8")
    return OperatorToken(path)


def make(
    operator: OperatorToken,
    sites: OneSite = NORTH,
    bounds: Bounds | None = None,
    hook: Hook | None = None,
    clock: list[float] | None = None,
) -> Guard:
    now = clock or [0.0]
    bounds = bounds or Bounds()
    return Guard(
        answer("flower"), answer("ours"), DOORS, sites, operator, bounds, hook, lambda: now[0]
    )


def answer(name: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = f"{name} {len(message['body'])}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def signed(
    key: ec.EllipticCurvePrivateKey = KEY, ago_s: float = 0.0, session: str = ""
) -> dict[str, str]:
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago_s)
    stamp = moment.isoformat()
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        PUBLIC_KEY_HEADER: b64encode(public_pem(key).encode()).decode(),
        TIMESTAMP_HEADER: stamp,
        SIGNATURE_HEADER: b64encode(signature).decode(),
        SESSION_HEADER: session,
    }


def ask(
    guard: Guard,
    path: str,
    headers: dict[str, str] | None = None,
    method: str = "POST",
    peer: str = "10.0.0.9",
    content: Any = b"",
) -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(guard, client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="https://link") as client:
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(one())


def raw_status(guard: Guard, raw_path: str, headers: dict[str, str]) -> int:
    """The answer to a path that no client's library has put in order, as uvicorn hands it over."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("10.0.0.9", 1),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return int(sent[0]["status"])


def test_a_registered_site_reaches_the_devices_paths_and_no_other(operator: OperatorToken) -> None:
    guard = make(operator)
    assert ask(guard, PULL, signed()).text == "flower 0"
    for path in (LIST_RUNS, ACQUIRE):
        assert ask(guard, path, signed()).status_code == 401
    assert ask(guard, "/v1/fleet/register-node", signed()).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
        "/v1//control/list-runs",
        "/v1/control/list-runs/",
        "/V1/CONTROL/list-runs",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull%2dmessages",
        "/v1/fleet/pull-messages;/../../control/list-runs",
        "/v1/control/unheard-of",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_paths_are_compared_as_they_came(operator: OperatorToken, path: str) -> None:
    for headers in (signed(), TOKEN):
        assert raw_status(make(operator), path, headers) in (401, 404)


def test_a_plain_path_passes_the_same_test(operator: OperatorToken) -> None:
    assert raw_status(make(operator), PULL, signed()) == 200


def test_the_method_is_the_one_of_the_request_line(operator: OperatorToken) -> None:
    override = {"x-http-method-override": "POST", **signed()}
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        assert ask(make(operator), PULL, override, method).status_code == 405


def test_control_needs_the_operators_token(operator: OperatorToken) -> None:
    guard = make(operator)
    assert ask(guard, LIST_RUNS, TOKEN).text == "flower 0"
    for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "the-operators-token"}):
        refused = ask(guard, LIST_RUNS, wrong)
        assert (refused.status_code, refused.headers[REASON_HEADER]) == (401, "credentials")


def test_a_rotated_token_counts_at_once(operator: OperatorToken, tmp_path: Path) -> None:
    guard = make(operator)
    assert ask(guard, LIST_RUNS, TOKEN).status_code == 200
    (tmp_path / "operator.new").write_text('token = "another"\n', encoding="utf-8")
    (tmp_path / "operator.new").replace(tmp_path / "operator.toml")
    assert ask(guard, LIST_RUNS, TOKEN).status_code == 401
    assert ask(guard, LIST_RUNS, {"authorization": "Bearer another"}).status_code == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("path", [LIST_RUNS, ACQUIRE])
def test_loopback_needs_the_token_too(operator: OperatorToken, path: str, peer: str) -> None:
    """Other users of the machine come from there, and proxies and tunnels that end there."""
    assert ask(make(operator), path, peer=peer).status_code == 401
    wrong = {"authorization": "Bearer wrong"}
    assert ask(make(operator), path, wrong, peer=peer).status_code == 401
    assert ask(make(operator), path, TOKEN, peer=peer).status_code == 200


def test_a_site_is_told_why_it_is_refused(operator: OperatorToken) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    unknown = ask(make(operator), PULL, signed(stranger))
    assert (unknown.status_code, unknown.headers[REASON_HEADER]) == (403, "site")
    assert "not registered here" in unknown.text
    revoked = ask(make(operator, replace(NORTH, state="revoked")), PULL, signed())
    assert (revoked.status_code, revoked.text) == (403, "the operator has revoked the site north")
    unsigned = ask(make(operator), PULL)
    assert (unsigned.status_code, "not signed" in unsigned.text) == (403, True)


def test_a_signature_must_be_the_sites_own_and_fresh(operator: OperatorToken) -> None:
    guard = make(operator)
    stolen = signed(ec.generate_private_key(ec.SECP384R1())) | {
        PUBLIC_KEY_HEADER: signed()[PUBLIC_KEY_HEADER]
    }
    assert "not signed by the site's key" in ask(guard, PULL, stolen).text
    assert ask(guard, PULL, signed(ago_s=250)).status_code == 200
    for ago_s in (3600, -3600):
        old = ask(guard, PULL, signed(ago_s=ago_s))
        assert (old.status_code, "by the coordinator's clock" in old.text) == (503, True)
    malformed = signed() | {TIMESTAMP_HEADER: "yesterday"}
    assert ask(guard, PULL, malformed).status_code == 503


def test_a_body_is_bounded_by_what_it_says_and_by_what_it_holds(operator: OperatorToken) -> None:
    guard = make(operator, bounds=Bounds(body_bytes=1000))
    assert ask(guard, PULL, signed(), content=bytes(1000)).text == "flower 1000"
    assert ask(guard, PULL, signed(), content=bytes(1001)).status_code == 413

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(100)

    assert ask(guard, PULL, signed(), content=endless()).status_code == 413


def test_a_body_that_says_it_is_too_large_is_not_read(operator: OperatorToken) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("it was read")
        yield b""

    said = {**signed(), "content-length": "1001"}
    guard = make(operator, bounds=Bounds(body_bytes=1000))
    assert ask(guard, PULL, said, content=never()).status_code == 413


def test_a_body_that_stands_still_is_given_up(
    operator: OperatorToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BODY_S", 0.05)

    async def still() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(5)

    assert ask(make(operator), PULL, signed(), content=still()).status_code == 408


def test_who_shows_nothing_may_not_have_much_kept(
    operator: OperatorToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, most = make(operator), module.STRANGER_BYTES
    assert ask(guard, JOIN, content=bytes(most)).text == f"ours {most}"
    for path in (JOIN, module.HEALTH):
        assert ask(guard, path, content=bytes(most + 1)).status_code == 413
    site = {"authorization": "Bearer the-sites-token"}
    assert ask(guard, ECHO, site, content=bytes((4 << 20) + 1)).status_code == 413

    async def still() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(5)

    monkeypatch.setattr(module, "STRANGER_S", 0.05)
    assert ask(guard, JOIN, content=still()).status_code == 408


@pytest.mark.parametrize("said", ["\u00b2", "-1", "9" * 5000])
def test_a_length_that_is_no_number_is_refused(operator: OperatorToken, said: str) -> None:
    assert raw_status(make(operator), PULL, signed() | {"content-length": said}) == 400


def test_a_flood_is_refused_and_passes(operator: OperatorToken) -> None:
    clock = [100.0]
    guard = make(operator, bounds=Bounds(requests_per_s=2.0, burst=3), clock=clock)
    statuses = [ask(guard, PULL, signed()).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert ask(guard, LIST_RUNS, TOKEN).status_code == 200
    clock[0] += 1.0
    assert [ask(guard, PULL, signed()).status_code for _ in range(3)] == [200, 200, 429]


def test_a_peer_that_guesses_is_told_no_reasons_any_more_and_locks_nobody_out(
    operator: OperatorToken,
) -> None:
    guard = make(operator, bounds=Bounds(burst=5))
    wrong = {"authorization": "Bearer wrong"}
    statuses = [ask(guard, LIST_RUNS, wrong, peer="10.6.6.6").status_code for _ in range(8)]
    assert statuses == [401] * 5 + [429] * 3
    for peer in ("10.0.0.9", "10.6.6.6"):
        assert ask(guard, PULL, signed(), peer=peer).status_code == 200
        assert ask(guard, LIST_RUNS, TOKEN, peer=peer).status_code == 200


def test_our_own_paths_are_public_or_need_a_sites_token(operator: OperatorToken) -> None:
    guard = make(operator)
    assert ask(guard, JOIN).text == "ours 0"
    assert ask(guard, ECHO).status_code == 401
    assert ask(guard, ECHO, {"authorization": "Bearer the-sites-token"}, "GET").text == "ours 0"
    assert ask(guard, ECHO, TOKEN).text == "ours 0"
    revoked = make(operator, replace(NORTH, state="revoked"))
    assert ask(revoked, ECHO, {"authorization": "Bearer the-sites-token"}).status_code == 401


def test_the_process_that_connected_last_is_the_site(operator: OperatorToken) -> None:
    guard = make(operator)
    assert ask(guard, ACTIVATE, signed(session="one")).status_code == 200
    assert ask(guard, PULL, signed(session="one")).status_code == 200
    assert ask(guard, ACTIVATE, signed(session="two")).status_code == 200
    assert ask(guard, PULL, signed(session="two")).status_code == 200
    before = ask(guard, PULL, signed(session="one"))
    assert (before.status_code, before.headers[REASON_HEADER]) == (403, "superseded")


def test_refusals_are_logged_as_json_and_not_without_end(
    operator: OperatorToken, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fedtune.link")
    guard = make(operator, bounds=Bounds(burst=1000))
    for _ in range(200):
        ask(guard, "/nothing", peer="10.6.6.6")
    assert len(caplog.records) == 100
    assert '"peer": "10.6.6.6"' in caplog.text


def test_a_hook_may_answer_instead(operator: OperatorToken) -> None:
    async def fault(scope: Any) -> int | None:
        return 500 if scope["path"] == PULL else None

    guard = make(operator, hook=fault)
    assert ask(guard, PULL, signed()).status_code == 500
    assert ask(guard, ACTIVATE, signed()).status_code == 200


def test_a_site_is_told_when_to_ask_again_and_nobody_else_is(operator: OperatorToken) -> None:
    guard = make(operator)
    assert float(ask(guard, PULL, signed()).headers[HEADER]) == LEAST_S
    assert HEADER not in ask(guard, ACTIVATE, signed()).headers
    assert HEADER not in ask(guard, LIST_RUNS, TOKEN).headers
    assert HEADER not in ask(guard, PULL).headers
