"""Who asks: the operator by a token, a site by its registered key or by its token."""

from __future__ import annotations

from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Mapping
from typing import Protocol

from fedtune.flwr_compat import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    signing_fault,
)


class Site(Protocol):
    """A line of the registry, as far as the guard reads it."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str:
        """`invited`, `enrolled` or `revoked`."""
        ...


class Sites(Protocol):
    """The registry, as far as the guard reads it (`fedtune_server.registry.Registry`)."""

    def by_public_key(self, key: bytes) -> Site | None: ...

    def by_token(self, token: str) -> Site | None: ...

    def set_node(self, name: str, node_id: int) -> None: ...


def bearer(headers: Mapping[str, str]) -> str:
    """The token of `authorization: Bearer TOKEN`; empty: there is none."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def signed_by(
    headers: Mapping[str, str],
    sites: Sites,
    fault: Callable[[bytes, bytes, str], str] = signing_fault,
) -> tuple[str, str]:
    """The site that signed a request, and what is wrong with it, if anything.

    Returns:
        The site's name, and an empty text or the reason, for the site to read. The name is empty
        where the key is not one of an enrolled site.
    """
    try:
        key = b64decode(headers[PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[SIGNATURE_HEADER], validate=True)
        timestamp = headers[TIMESTAMP_HEADER]
    except (KeyError, Base64Error, ValueError):
        return "", "the request is not signed by a site's key"
    site = sites.by_public_key(key)
    if site is None:
        return "", "this key is not registered here; ask the operator for an invitation"
    if site.state != "enrolled":
        return "", f"the operator has {site.state} the site {site.name}"
    return site.name, fault(key, signature, timestamp)
