"""How sites come in: the two requests that a stranger may make of a coordinator.

    GET  /fedtune/v1/ca     the certificate authority, which the site compares with its join code
    POST /fedtune/v1/join   {version, secret, public_key, proof} -> {name, token, service_port}

Everything else is refused before it comes here. Joining is done in an order that can be repeated
after a crash at any point: the registry first, then Flower, then Flower's number in the registry.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedtune.deploy.certificates import fingerprint, proves
from fedtune.deploy.homes import CoordinatorHome
from fedtune.deploy.join_code import SECRET_BYTES
from fedtune.errors import AccessError, DeploymentError, FedtuneError
from fedtune_server.registry import Registry

CA_PATH = "/fedtune/v1/ca"
JOIN_PATH = "/fedtune/v1/join"
MOST_BODY_BYTES = 16_384

_WINDOW_S = 600.0
_FAILURES_PER_PEER = 10
_FAILURES_TOGETHER = 1000
"""Wrong codes in a window. At this pace a guess of 80 bits takes longer than there is time; the
limits keep the log short and tell of an attack."""
_MOST_PEERS = 4096

_log = logging.getLogger(__name__)

RegisterNode = Callable[[bytes], int]
"""Tells Flower of a public key (PEM) and returns its number; a key that Flower knows gives the same
number again."""


class _JoinRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    secret: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * SECRET_BYTES}}}$")]
    public_key: Annotated[str, StringConstraints(min_length=1, max_length=2048)]
    proof: Annotated[str, StringConstraints(min_length=1, max_length=512)]


class Failures:
    """Counts of wrong codes, per peer and together, over a window that slides in steps."""

    def __init__(
        self,
        per_peer: int = _FAILURES_PER_PEER,
        together: int = _FAILURES_TOGETHER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_peer = per_peer
        self._together = together
        self._clock = clock
        self._began = clock()
        self._total = 0
        self._of: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def wait_s(self, peer: str) -> float:
        """Seconds until this peer may try again; 0: now."""
        with self._lock:
            self._slide()
            if self._total < self._together and self._of.get(peer, 0) < self._per_peer:
                return 0.0
            return max(1.0, self._began + _WINDOW_S - self._clock())

    def count(self, peer: str) -> None:
        """A wrong code came from this peer."""
        with self._lock:
            self._slide()
            self._total += 1
            self._of[peer] = self._of.get(peer, 0) + 1
            self._of.move_to_end(peer)
            while len(self._of) > _MOST_PEERS:  # bounded against many addresses
                self._of.popitem(last=False)

    def _slide(self) -> None:
        if self._clock() - self._began >= _WINDOW_S:
            self._began = self._clock()
            self._total = 0
            self._of.clear()


def routes(
    home: CoordinatorHome, register_node: RegisterNode, failures: Failures | None = None
) -> list[Route]:
    """The routes of enrolment, to be served over TLS.

    Args:
        home: the coordinator's.
        register_node: tells Flower of a site's key.
        failures: counts of wrong codes; None: new ones.

    Raises:
        DeploymentError: the home is not whole.
    """
    settings = home.settings()
    # Behind a proxy all sites are one peer.
    counts = failures or Failures(
        per_peer=_FAILURES_TOGETHER if settings.behind_proxy else _FAILURES_PER_PEER
    )
    registry = Registry(home.registry)

    async def authority(_: Request) -> Response:
        return PlainTextResponse(await run_in_threadpool(home.ca_certificate.read_bytes))

    async def join(request: Request) -> Response:
        peer = request.client.host if request.client is not None else "unknown"
        wait_s = counts.wait_s(peer)
        if wait_s:
            return _refuse(
                peer, 429, f"too many wrong join codes; try again in {wait_s:.0f} s", wait_s
            )
        body = await _body(request)
        if body is None:
            return _refuse(peer, 413, f"expected at most {MOST_BODY_BYTES} bytes, found more")
        try:
            answer = await run_in_threadpool(
                _join, registry, home, register_node, body, settings.service_port
            )
        except AccessError as error:
            counts.count(peer)
            return _refuse(peer, 403, str(error))
        except DeploymentError as error:
            counts.count(peer)
            return _refuse(peer, 400, str(error))
        except FlowerUnavailableError as error:
            return _refuse(peer, 503, str(error))
        _log.info("site joined", extra={"fields": {"peer": peer, "site": answer["name"]}})
        return JSONResponse(answer, headers={"cache-control": "no-store"})

    return [
        Route(CA_PATH, authority, methods=["GET"]),
        Route(JOIN_PATH, join, methods=["POST"]),
    ]


class FlowerUnavailableError(FedtuneError):
    """Flower could not be told of a site, which may repeat its request."""


def reconcile(
    registry: Registry, register_node: RegisterNode, unregister_node: Callable[[int], None]
) -> None:
    """Have Flower know those sites that the registry does, and no other.

    To be called when the link starts and when the registry has changed: a site may have been
    revoked while nothing ran, or the coordinator have died in the middle of a join.

    Args:
        register_node: tells Flower of a key; returns its number.
        unregister_node: has Flower forget a number.
    """
    for node_id in registry.retired_nodes():
        unregister_node(node_id)
        registry.forget_node(node_id)
    for site in registry.sites().values():
        if site.state == "enrolled" and site.node_id is None:
            registry.set_node(site.name, register_node(flower_key(site.public_key)))


def flower_key(public_key: str) -> bytes:
    """A key of the registry byte for byte as Flower's node shows it."""
    return public_key.strip().encode("ascii") + b"\n"


def _join(
    registry: Registry,
    home: CoordinatorHome,
    register_node: RegisterNode,
    body: bytes,
    service_port: int,
) -> dict[str, object]:
    asked = _parse(body)
    secret = bytes.fromhex(asked.secret)
    try:
        proof = base64.b64decode(asked.proof, validate=True)
    except (binascii.Error, ValueError):
        raise DeploymentError("proof: expected base64, found something else") from None
    public_key = asked.public_key.encode("utf-8", errors="replace")
    authority = fingerprint(home.ca_certificate.read_bytes())
    if not proves(public_key, secret, authority, proof):
        raise AccessError(
            "the proof is not of this key and this coordinator: something stands between, or the "
            "coordinator's authority has changed; ask for a new join code"
        )
    enrolled = registry.enrol(secret, public_key)
    if enrolled.node_id is None:
        key = flower_key(registry.site(enrolled.name).public_key)
        try:
            node_id = register_node(key)
        except Exception as error:  # Flower's clients raise kinds of their own
            _log.exception("Flower could not be told of a site")
            raise FlowerUnavailableError(
                f"the coordinator could not tell Flower of {enrolled.name} "
                f"({type(error).__name__}); give the same command again in a minute"
            ) from error
        registry.set_node(enrolled.name, node_id)
    return {"name": enrolled.name, "token": enrolled.token, "service_port": service_port}


def _parse(body: bytes) -> _JoinRequest:
    try:
        return _JoinRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input holds a secret
        key = ".".join(str(part) for part in first["loc"])
        raise DeploymentError(f"join request: {key}: {first['msg']}") from None


async def _body(request: Request) -> bytes | None:
    """The body, or None where it is too long; no more than the limit is ever held."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            return None
    return body


def _refuse(peer: str, status: int, reason: str, wait_s: float = 0.0) -> Response:
    fields = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "peer": peer,
        "status": status,
        "reason": reason,
    }
    _log.warning("join refused: %s", json.dumps(fields), extra={"fields": fields})
    headers = {"cache-control": "no-store"}
    if wait_s:
        headers["retry-after"] = str(int(wait_s) + 1)
    return JSONResponse({"reason": reason}, status, headers=headers)
