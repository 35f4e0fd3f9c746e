"""Builds the link of a coordinator's home and serves it until SIGTERM."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.flower_process import (
    EXIT_CONFIG,
    EXIT_RESTART,
    leave,
    start_log,
    talk_to_the_coordinator_alone,
)
from fedtune.deploy.homes import CoordinatorHome, ServerSettings
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
        routes: Starlette's routes of enrolment, all public.
        hook: see `Guard`.
    """

    sites: Sites
    routes: Sequence[Any]
    hook: Hook | None = None


def main(arguments: Sequence[str]) -> None:
    """The process; it never returns."""
    options = _options(arguments)
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
    # A node is made known to Flower when it first connects (`_on_activate`), so that a lost
    # database heals by itself; enrolling needs no call to a link that may not be up yet.
    return LinkParts(registry, enrolment.routes(home, lambda public_key: 0))


def guarded_app(
    home: CoordinatorHome, settings: ServerSettings, parts: LinkParts, *, insecure: bool = False
) -> Guard:
    """Flower's link with the guard around it."""
    from starlette.applications import Starlette

    from fedtune.flwr_compat import known_paths, link_app, take_node_over
    from fedtune_server.link.credentials import OperatorToken
    from fedtune_server.link.echo import PATH, echo_route
    from fedtune_server.link.guard import Bounds, Doors, Guard

    def on_activate(request: Any, state: Any) -> None:
        site = parts.sites.by_public_key(request.public_key)
        name = site.name if site is not None else ""
        node_id = take_node_over(request, state, name)
        if name and (set_node := getattr(parts.sites, "set_node", None)) is not None:
            set_node(name, node_id)
        _log.info("%s connects", name, extra={"fields": {"site": name, "node_id": node_id}})

    home.flower.mkdir(parents=True, exist_ok=True)
    flower = link_app(_flower_arguments(home, settings, insecure), on_activate)
    flower.state.enable_supernode_auth = True
    doors = Doors(
        fleet=known_paths("/v1/fleet/") - set(_NOT_FOR_DEVICES),
        operator=known_paths("/v1/control/") | known_paths("/v1/runtime/"),
        public=frozenset(route.path for route in parts.routes),
        tokened=frozenset({PATH}),
    )
    limits = settings.limits
    bounds = Bounds(
        limits.requests_per_s,
        limits.burst,
        limits.body_bytes,
        trust_loopback=not settings.behind_proxy,
    )
    ours = Starlette(routes=[echo_route(), *parts.routes])
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

    app = guarded_app(home, settings, parts, insecure=insecure)
    # Flower is imported by now, and its loggers can be taken over.
    start_log("link", home.logs)
    if insecure:
        _log.warning("--insecure: the link speaks plaintext; anybody on the way can read it")
    config = uvicorn.Config(
        app,
        host=settings.bind,
        port=settings.port,
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
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit:  # the port is taken, or Flower's start failed: the log says so
        leave(EXIT_RESTART)
    if not server.started:
        leave(EXIT_RESTART)


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
