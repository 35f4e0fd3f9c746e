"""Connections to the coordinator's gRPC service, and its refusals as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc

from fedtune.errors import AccessError, DeploymentError

CALL_S = 30.0
"""Longest that a call without a stream may take, in seconds."""
MESSAGE_BYTES = 4 << 20
"""Largest message, either way."""

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # A peer that is gone is noticed within 30 s, and streams are quiet for long.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)


def open_channel(service: str, ca_pem: bytes, token: str, *, insecure: bool = False) -> Any:
    """A channel to a coordinator, every call of which carries the token.

    Nothing is sent before the first call.

    Args:
        service: HOST:PORT of the gRPC service.
        ca_pem: the one authority that the coordinator's certificate must come from.
        token: the operator's or the site's own.
        insecure: without TLS, where the coordinator was started so; the token is not secret then.
    """
    if insecure:
        channel = grpc.insecure_channel(service, options=list(_OPTIONS))
    else:
        credentials = grpc.ssl_channel_credentials(root_certificates=ca_pem)
        channel = grpc.secure_channel(service, credentials, options=list(_OPTIONS))
    return grpc.intercept_channel(channel, _Bearer(token))


class _Details(NamedTuple):
    """A call's details as interceptors hand them on."""

    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str]]
    credentials: object
    wait_for_ready: bool | None
    compression: object


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]  # grpc has no types
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Adds the token to every call; Flower's HTTP side uses the same header."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _call(self, continuation: Any, details: Any, request: Any) -> Any:  # grpc has no types
        metadata = [*(details.metadata or ()), self._header]
        return continuation(
            _Details(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary = _call
    intercept_unary_stream = _call
    intercept_stream_unary = _call
    intercept_stream_stream = _call


@contextmanager
def spoken_errors(service: str) -> Iterator[None]:
    """Turn what gRPC raises into one line for a person.

    Args:
        service: HOST:PORT, to be named.

    Raises:
        AccessError: the token is not known, or has no right to this.
        DeploymentError: the coordinator does not answer, or refuses with a reason.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise spoken(error, service) from None


def spoken(error: Any, service: str = "") -> DeploymentError:
    """The error of ours for one of gRPC's.

    Args:
        service: HOST:PORT, to be named; empty: not known here.
    """
    code, words = error.code(), one_line(error.details() or "")
    coordinator = f"the coordinator at {service}" if service else "the coordinator"
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return AccessError(words or f"{coordinator} refused the call")
    if code == grpc.StatusCode.UNAVAILABLE:
        return DeploymentError(f"{coordinator} does not answer ({words}); {_remedy(words)}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeploymentError(f"{coordinator} took too long to answer; try again")
    return DeploymentError(words or f"{coordinator} refused the call ({code.name})")


def _remedy(words: str) -> str:
    """What to do about a connection that was not made, by gRPC's words for it."""
    if "WRONG_VERSION_NUMBER" in words:
        return (
            "it speaks without TLS there: check the port, and only if the coordinator was started "
            "with --insecure, give --insecure, too"
        )
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return (
            "its certificate is not of the authority that is known here, or has ended: fedtune "
            "server rotate makes a new one; after rotate --ca, copy operator.toml anew, and let "
            "sites join with --again"
        )
    return "is it started, and is the address right?"


def one_line(text: str, most: int = 2000) -> str:
    """A text from the network, fit for a terminal: one line, no control characters, clipped."""
    clean = text[: 4 * most]
    if not clean.isprintable():
        clean = "".join(c if c.isprintable() else " " for c in clean)
    return " ".join(clean.split())[:most]
