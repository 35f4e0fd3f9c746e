"""Builds the link of a coordinator's home and serves it until SIGTERM."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.exit_codes import EXIT_CONFIG, EXIT_RESTART
from fedtune.deploy.flower_process import (
    leave,
    start_log,
    talk_to_the_coordinator_alone,
)
from fedtune.deploy.homes import CoordinatorHome, ServerSettings
from fedtune.deploy.memory import return_freed_memory
from fedtune.errors import DeploymentError

if TYPE_CHECKING:
    from fedtune_server.link.credentials import Sites
    from fedtune_server.link.guard import Guard, Hook

STOP_S = 2
"""How long requests that are under way may take after SIGTERM."""
MOST_CONNECTIONS = 2000

_NOT_FOR_DEVICES = ("/v1/fleet/register-node", "/v1/fleet/unregister-node")
_log = logging.getLogger("fedtune.link")


@dataclass(frozen=True, slots=True)
class LinkParts:
    """What a link is made of beside its home; tests give their own.

    Attributes:
        sites: the registry.
        routes: Starlette's routes of enrolment, all public; made with the function that lets
            Flower know of a public key (PEM) and returns its node's id.
        reconcile: called once Flower's database is open, with that function and with one that has
            Flower forget a node.
        hook: see `Guard`.
    """

    sites: Sites
    routes: Callable[[Callable[[bytes], int]], Sequence[Any]]
    reconcile: Callable[[Callable[[bytes], int], Callable[[int], None]], None]
    hook: Hook | None = None


def main(arguments: Sequence[str]) -> None:
    """The process; it never returns."""
    options = _options(arguments)
    return_freed_memory()
    home = CoordinatorHome(options.home)
    talk_to_the_coordinator_alone(home.flower)
    start_log("link", home.logs)
    try:
        parts = deployed_parts(home)
        serve(home, home.settings(), parts, insecure=options.insecure)
    except DeploymentError as error:
        _log.error("%s", error)
        leave(EXIT_CONFIG)
    leave(0)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fedtune_server.link", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--insecure", action="store_true", help="plaintext, for a proxy or a test")
    return parser.parse_args(arguments)


def deployed_parts(home: CoordinatorHome) -> LinkParts:
    """The registry and the enrolment of a coordinator."""
    registry = importlib.import_module("fedtune_server.registry").Registry(home.registry)
    enrolment = importlib.import_module("fedtune_server.enrolment")
    return LinkParts(
        registry, partial(enrolment.routes, home), partial(enrolment.reconcile, registry)
    )


def guarded_app(
    home: CoordinatorHome, settings: ServerSettings, parts: LinkParts, *, insecure: bool = False
) -> Guard:
    """Flower's link with the guard around it."""
    from starlette.applications import Starlette

    from fedtune.flwr_compat import LinkNodes, known_paths, link_app
    from fedtune_server.link.echo import PATH, echo_route
    from fedtune_server.link.guard import Bounds, Doors, Guard
    from fedtune_server.operator_token import OperatorToken

    def on_activate(public_key: bytes) -> None:
        # Flower's database may be younger than the registry: then it learns of the node here.
        node_id = nodes.make_ready(public_key)
        if (site := parts.sites.by_public_key(public_key)) is not None:
            parts.sites.set_node(site.name, node_id)
            fields = {"site": site.name, "node_id": str(node_id)}
            _log.info("%s connects", site.name, extra={"fields": fields})

    home.flower.mkdir(parents=True, exist_ok=True)
    flower = link_app(_flower_arguments(home, settings, insecure), on_activate)
    nodes = LinkNodes(flower)
    parts.reconcile(nodes.register, nodes.forget)
    routes = parts.routes(nodes.register)
    doors = Doors(
        fleet=known_paths("/v1/fleet/") - set(_NOT_FOR_DEVICES),
        operator=known_paths("/v1/control/") | known_paths("/v1/runtime/"),
        public=frozenset(route.path for route in routes),
        tokened=frozenset({PATH}),
    )
    limits = settings.limits
    bounds = Bounds(limits.requests_per_s, limits.burst, limits.body_bytes)
    ours = Starlette(routes=[echo_route(), *routes])
    operator = OperatorToken(home.operator_file)
    operator.read()
    return Guard(flower, ours, doors, parts.sites, operator, bounds, parts.hook)


def serve(
    home: CoordinatorHome, settings: ServerSettings, parts: LinkParts, *, insecure: bool = False
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        DeploymentError: a file of the home is missing.
    """
    import uvicorn

    from fedtune_server.link.heads import link_protocol
    from fedtune_server.renewing import RenewingServer

    app = guarded_app(home, settings, parts, insecure=insecure)
    # Flower is imported by now, and its loggers can be taken over.
    start_log("link", home.logs)
    if insecure:
        _log.warning("--insecure: the link speaks plaintext; anybody on the way can read it")
    config = uvicorn.Config(
        app,
        host=settings.bind,
        port=settings.port,
        http=link_protocol(),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.behind_proxy,
        forwarded_allow_ips="127.0.0.1,::1",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_S,
        limit_concurrency=MOST_CONNECTIONS,
        ssl_certfile=None if insecure else str(home.certificate),
        ssl_keyfile=None if insecure else str(home.key),
    )
    server = RenewingServer(config, _SameAuthority(home.ca_certificate))
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn stops at a signal, and raises it again once it has stopped: that is for nobody.
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit:  # the port is taken, or Flower's start failed: the log says so
        leave(EXIT_RESTART)
    if not server.started:
        leave(EXIT_RESTART)


class _SameAuthority:
    """Whether the authority is the one that the coordinator's processes began with, and trust."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began_with = self._read()
        self._was_told = False

    def __call__(self) -> bool:
        same = self._read() == self._began_with
        if not same and not self._was_told:
            self._was_told = True
            _log.warning(
                "there is a new authority, which counts once the coordinator was started again"
            )
        return same

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError:
            return b""


def _flower_arguments(home: CoordinatorHome, settings: ServerSettings, insecure: bool) -> list[str]:
    for path in (home.ca_certificate, home.certificate, home.key):
        if not path.is_file():
            raise DeploymentError(f"{path} is missing; make it with: fedtune server init")
    tls = ["--ssl-certfile", str(home.certificate), "--ssl-keyfile", str(home.key)]
    tls += ["--ssl-ca-certfile", str(home.ca_certificate), "--enable-supernode-auth"]
    return [
        *("--host", settings.bind, "--port", str(settings.port)),
        *("--database", str(home.flower / "state.db")),
        *("--isolation", "process", "--disable-runtime-dependency-installation"),
        *(["--insecure"] if insecure else tls),
    ]
