"""Starts and stops the dashboard's server, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import threading
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.errors import DeploymentError
from fedtune_server.dashboard.app import Parts, make_app
from fedtune_server.dashboard.feed import Readings, page_feed
from fedtune_server.dashboard.guard import Guard
from fedtune_server.dashboard.login import Doorkeeper, read_tokens
from fedtune_server.dashboard.metrics import metrics_text
from fedtune_server.link.heads import bounded_heads
from fedtune_server.renewing import RenewingServer

_START_S = 15.0
_STOP_S = 4.0
_log = logging.getLogger(__name__)


class Dashboard:
    """A dashboard that runs; `stop` ends it."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket, address: str) -> None:
        self._server, self._listener = server, listener
        self.address = address
        self._thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="dashboard", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin to answer.

        Raises:
            DeploymentError: the server does not come up.
        """
        self._thread.start()
        until = time.monotonic() + _START_S
        while not self._server.started:
            if time.monotonic() > until or not self._thread.is_alive():
                self.stop()
                raise DeploymentError(f"the dashboard did not start at {self.address}; see the log")
            time.sleep(0.02)

    def stop(self) -> None:
        """End within a few seconds, open pages included."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        self._listener.close()


class _Server(RenewingServer):
    """A server that ends open pages, too."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for open connections a little, then cut those that do not answer a goodbye."""
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0.05)  # the loop closes their sockets


def serve(
    readings: Readings, settings: ServerSettings, home: CoordinatorHome, *, insecure: bool = False
) -> Dashboard:
    """Start the dashboard at `settings.dashboard_port`.

    Args:
        insecure: plaintext, for tests and for proxies that end TLS.

    Raises:
        DeploymentError: there is no token or certificate, or the port is taken.
    """
    read_tokens(home)  # refuses to start without one
    if insecure:
        _log.warning("dashboard: INSECURE: plaintext; anyone on the way reads the token")
    parts = Parts(
        page_feed(readings),
        Doorkeeper(lambda: read_tokens(home)),
        lambda: metrics_text(readings),
        lambda: server.should_exit,
        secure=not insecure,
    )
    listener = _listen(settings.bind, settings.dashboard_port)
    try:
        server = _Server(_config(Guard(make_app(parts), [settings.host]), home, insecure))
    except (OSError, ssl.SSLError) as error:
        listener.close()
        raise DeploymentError(
            f"the dashboard cannot use {home.certificate} and {home.key} ({error}); "
            "make them with: fedtune server init"
        ) from None
    scheme = "http" if insecure else "https"
    address = f"{scheme}://{settings.host}:{listener.getsockname()[1]}/"
    dashboard = Dashboard(server, listener, address)
    dashboard.start()
    _log.info("dashboard: %s", address)
    return dashboard


def _config(app: Guard, home: CoordinatorHome, insecure: bool) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        loop="asyncio",  # the same on every machine, whatever else is installed
        http=bounded_heads(H11Protocol),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=128,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=2,
        ssl_certfile=None if insecure else home.certificate,
        ssl_keyfile=None if insecure else home.key,
    )
    config.load()  # reads the certificate, so that an error comes to the caller
    return config


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":  # on Windows it would let two processes have one port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise DeploymentError(
            f"the dashboard cannot listen on {host}:{port} ({error.strerror}); change "
            "dashboard_port in server.toml"
        ) from None
    return listener
