"""Enrolment as a stranger sees it: two requests, hostile bodies, and guesses that run dry."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from fedtune.deploy.certificates import fingerprint, make_node_key, prove
from fedtune.deploy.coordinator_home import make_coordinator
from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.join_code import JoinCode
from fedtune_server.enrolment import CA_PATH, JOIN_PATH, MOST_BODY_BYTES, Failures, routes
from fedtune_server.registry import Registry

KEY = make_node_key()


class Client:
    """Requests to an app in this process, each to its end."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    def get(self, path: str) -> httpx.Response:
        return self._send("GET", path)

    def post(self, path: str, **content: Any) -> httpx.Response:
        return self._send("POST", path, **content)

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(
                self._app, raise_app_exceptions=False, client=("10.0.0.9", 1)
            )
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await client.request(method, path, **content)

        return asyncio.run(send())


async def parts(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * 1000


class Door:
    def __init__(self, home: CoordinatorHome, failures: Failures | None = None) -> None:
        self.home = home
        self.registry = Registry(home.registry)
        self.registered: list[bytes] = []
        self.now = 0.0
        app = Starlette(routes=routes(home, self._register, failures))
        self.client = Client(app)

    def _register(self, key: bytes) -> int:
        self.registered.append(key)
        return 17

    def request(self, code: JoinCode, **changes: object) -> dict[str, Any]:
        seen = fingerprint(self.home.ca_certificate.read_bytes())
        proof = prove(KEY.private, code.secret, seen)
        return {
            "version": 1,
            "secret": code.secret.hex(),
            "public_key": KEY.public.decode(),
            "proof": base64.b64encode(proof).decode(),
            **changes,
        }

    def post(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = self.client.post(JOIN_PATH, json=request)
        return answer.status_code, answer.json()


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(make_coordinator(tmp_path / "c", "localhost").home)


def test_a_stranger_gets_the_authority_and_with_a_code_a_token(door: Door) -> None:
    answer = door.client.get(CA_PATH)
    assert answer.content == door.home.ca_certificate.read_bytes()
    code = door.registry.invite("north")
    status, said = door.post(door.request(code))
    assert status == 200
    assert said == {"name": "north", "token": said["token"], "service_port": 9401}
    assert door.registry.by_token(said["token"]) is not None
    assert door.registered == [KEY.public]
    assert door.registry.name_of_node(17) == "north"
    status, said = door.post(door.request(code))  # the answer was lost
    assert status == 200
    assert door.registered == [KEY.public]


def test_what_is_wrong_is_said_and_logged_without_the_secret(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    code = door.registry.invite("north")
    unknown = JoinCode(b"0123456789", bytes(15))
    with caplog.at_level(logging.INFO):
        assert door.post(door.request(unknown))[0] == 403
        door.registry.revoke("north")
        status, said = door.post(door.request(code))
    assert status == 403
    assert "unknown" in said["reason"]
    lines = [record.getMessage() for record in caplog.records if "join refused" in record.message]
    assert len(lines) == 2
    fields = json.loads(lines[1].partition(": ")[2])
    assert fields.keys() == {"time", "peer", "status", "reason"}
    assert (fields["peer"], fields["status"]) == ("10.0.0.9", 403)
    assert code.secret.hex() not in caplog.text


def test_a_proof_of_another_key_or_authority_lets_nobody_in(door: Door) -> None:
    code = door.registry.invite("north")
    other = make_node_key()
    seen = fingerprint(door.home.ca_certificate.read_bytes())
    wrong_key = prove(other.private, code.secret, seen)
    wrong_authority = prove(KEY.private, code.secret, bytes(32))
    for proof in (wrong_key, wrong_authority, b"x"):
        text = base64.b64encode(proof).decode()
        status, said = door.post(door.request(code, proof=text))
        assert status == 403
        assert "the proof is not of this key" in said["reason"]
    assert door.registry.site("north").state == "invited"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"version": "1"}, {"secret": "zz" * 10}, {"secret": "00" * 11},
        {"secret": ["00" * 10]}, {"public_key": "x" * 3000}, {"public_key": "no key"},
        {"proof": "*"}, {"proof": ""}, {"proof": None}, {"more": 1}, {"public_key": "\ud800"},
    ],
)  # fmt: skip
def test_malformed_requests_are_refused_in_a_line(door: Door, changes: dict[str, object]) -> None:
    request = door.request(door.registry.invite("north"), **changes)
    answer = door.client.post(JOIN_PATH, content=json.dumps(request))
    assert answer.status_code == 400
    assert "\n" not in answer.json()["reason"]
    assert door.registry.site("north").state == "invited"


def test_a_long_body_is_not_read(door: Door) -> None:
    assert door.client.post(JOIN_PATH, content=b" " * (MOST_BODY_BYTES + 1)).status_code == 413
    assert door.client.post(JOIN_PATH, content=parts(1000)).status_code == 413


def test_only_the_two_requests_are_answered(door: Door) -> None:
    assert door.client.post(CA_PATH).status_code == 405
    assert door.client.get(JOIN_PATH).status_code == 405
    assert door.client.get("/fedtune/v1/").status_code == 404
    assert door.client.get("/fedtune/v1/ca/../ca.key").status_code == 404


def test_guesses_run_dry_even_for_a_right_code_until_the_window_has_passed(tmp_path: Path) -> None:
    home = make_coordinator(tmp_path / "c", "localhost").home
    now = [0.0]
    door = Door(home, Failures(per_peer=3, together=5, clock=lambda: now[0]))
    good = door.registry.invite("north")
    for i in range(3):
        assert door.post(door.request(JoinCode(bytes([i] * 10), bytes(15))))[0] == 403
    answer = door.client.post(JOIN_PATH, json=door.request(good))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "601"
    assert "try again in 600 s" in answer.json()["reason"]
    now[0] = 601.0
    assert door.post(door.request(good))[0] == 200


def test_many_addresses_together_are_bounded_too() -> None:
    failures = Failures(per_peer=3, together=10, clock=lambda: 0.0)
    for i in range(10):
        assert failures.wait_s(f"peer-{i}") == 0
        failures.count(f"peer-{i}")
    assert failures.wait_s("another") > 0


def test_peers_that_are_remembered_are_bounded() -> None:
    failures = Failures(per_peer=3, together=10**9, clock=lambda: 0.0)
    for i in range(10_000):
        failures.count(f"peer-{i}")
    assert len(failures._of) <= 4096


@pytest.fixture(scope="module")
def shared_door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    home = make_coordinator(tmp_path_factory.mktemp("door") / "c", "localhost").home
    return Door(home, Failures(per_peer=10**9, together=10**9))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.one_of(st.binary(max_size=400), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["version", "secret", "public_key", "proof", "x"]), inner, max_size=5
    ),
    max_leaves=8,
).map(lambda tree: json.dumps(tree).encode())))  # fmt: skip
def test_no_body_breaks_the_door(shared_door: Door, body: bytes) -> None:
    answer = shared_door.client.post(JOIN_PATH, content=body)
    assert answer.status_code == 400
    assert answer.json()["reason"]
