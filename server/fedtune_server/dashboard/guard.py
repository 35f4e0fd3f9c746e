"""What every request and answer of the dashboard must be: the host, the origin, the headers.

The host is checked against DNS rebinding: a page of somebody else whose name suddenly leads here
asks with its own name in `Host`. An address as a host cannot be rebound.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`, with which browsers post a form with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses foreign hosts and methods, and puts the headers on every answer.

    Args:
        app: what answers the rest.
        names: hosts that the dashboard is reached by, beside addresses; without ports.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {name.casefold() for name in (*names, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # no websockets here

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        host = Headers(scope=scope).get("host", "")
        if self._knows(host):
            await self._app(scope, receive, with_headers)
        else:
            text = "this dashboard is not reached by that name; see `host` in server.toml\n"
            await PlainTextResponse(text, 421)(scope, receive, with_headers)

    def _knows(self, host: str) -> bool:
        name = host_name(host)
        return name.casefold() in self._names or _is_address(name)


def host_name(host: str) -> str:
    """`name` of `name`, `name:port`, `[::1]:port`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def same_origin(headers: Headers) -> bool:
    """Whether a page of this dashboard sent the request, as browsers say it.

    `Origin` names the page's host on every post; `Sec-Fetch-Site` is there in newer browsers.
    """
    site = headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        return False
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] == headers.get("host")


def not_cross_site(headers: Headers) -> bool:
    """Whether a read may be answered: other sites' pages may not even ask."""
    return headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
