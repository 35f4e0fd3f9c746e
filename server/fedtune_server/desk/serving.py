"""The desk's gRPC server: TLS whose certificate may be rotated, bounds, health and reflection."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedtune.deploy.certificates import read_pair
from fedtune.errors import DeploymentError
from fedtune.v1 import coordinator_pb2
from fedtune.v1.coordinator_pb2_grpc import (
    add_ArtifactServiceServicer_to_server,
    add_RunServiceServicer_to_server,
    add_SiteServiceServicer_to_server,
)
from fedtune_server.desk.artifact_service import ArtifactService
from fedtune_server.desk.calls import Guard
from fedtune_server.desk.run_service import RunService
from fedtune_server.desk.site_service import SiteService

MESSAGE_BYTES = 4 << 20
"""Largest message: a chunk of 1 MiB, or a configuration of 1 MB, with room."""

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", 2 << 20),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 256),  # of one connection
    # A site that is gone is noticed within 30 s; who pings more often than agreed is cut off.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own five minutes would end a stream that is silent for one: callers ping every 20 s.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # two desks on one port would share its callers
)

_log = logging.getLogger(__name__)

_SERVICES = tuple(
    coordinator_pb2.DESCRIPTOR.services_by_name[name].full_name
    for name in ("RunService", "SiteService", "ArtifactService")
)


def make_server(
    runs: RunService, sites: SiteService, artifacts: ArtifactService, guard: Guard
) -> Any:  # grpc has no types
    """A server with all services; it has no port yet."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_end)
    server = grpc.aio.server(interceptors=[guard], options=list(_OPTIONS))
    for add, servicer in (
        (add_RunServiceServicer_to_server, runs),
        (add_SiteServiceServicer_to_server, sites),
        (add_ArtifactServiceServicer_to_server, artifacts),
    ):
        add(servicer, server)  # type: ignore[no-untyped-call]  # generated code has no types
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    server.fedtune_checks = checks
    return server


def _is_no_end(record: logging.LogRecord) -> bool:
    """Leave out that streams are cut where the desk ends: it would be a page for each site."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError)


async def set_serving(server: Any) -> None:
    """Say in the health service that every service answers."""
    for name in ("", *_SERVICES):
        await server.fedtune_checks.set(name, health_pb2.HealthCheckResponse.SERVING)


def listen(server: Any, address: str, credentials: Any | None) -> int:
    """Open a port; without credentials it is not encrypted.

    Returns:
        The port.

    Raises:
        DeploymentError: the port is taken or may not be opened.
    """
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise DeploymentError(
            f"{address} cannot be listened on; is another coordinator there? change service_port "
            "in server.toml, or end the other"
        )
    return int(port)


class Certificate:
    """The certificate and key as the files have them now, for each new connection.

    A pair that does not belong together, such as in the middle of a rotation, is not taken; the
    one before stays.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate, self._key = certificate, key
        self._lock = threading.Lock()
        self._read_at = self._stamp()
        self._initial = self._read()

    def credentials(self) -> Any:
        """What a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(self._initial, self.fetch)

    def fetch(self) -> Any:
        """The new pair where there is one; None: nothing has changed."""
        with self._lock:
            try:
                stamp = self._stamp()
                if stamp == self._read_at:
                    return None
                found = self._read()
            except (OSError, DeploymentError) as error:
                _log.warning("the certificate stays what it was: %s", error)
                return None
            self._read_at = stamp
        _log.info("a new certificate is used from now on")
        return found

    def _stamp(self) -> tuple[int, ...]:
        stats = [path.stat() for path in (self._certificate, self._key)]
        return tuple(value for stat in stats for value in (stat.st_mtime_ns, stat.st_ino))

    def _read(self) -> Any:
        pair = read_pair(self._certificate, self._key)
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)])


def plain_warning(address: str, say: Callable[[str], object]) -> None:
    """Say what is lost without TLS."""
    say(
        f"WARNING: {address} is not encrypted (--insecure): tokens and models can be read on the "
        "way; use it on a network of your own only"
    )
