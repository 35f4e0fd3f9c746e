"""Who asks: the operator by a token, a site by its registered key or by its token."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fedtune.errors import DeploymentError
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


class OperatorToken:
    """The operator's token, read anew when its file has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._digest = b""

    def read(self) -> str:
        """The token itself, for our own requests.

        Raises:
            DeploymentError: the file is not there or holds none.
        """
        try:
            token = tomllib.loads(self._path.read_text(encoding="utf-8")).get("token")
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DeploymentError(
                f"{self._path} cannot be read ({error}); make it with: fedtune server init"
            ) from None
        if not isinstance(token, str) or not token:
            raise DeploymentError(f'{self._path}: expected token = "...", found none')
        return token

    def matches(self, headers: Mapping[str, str]) -> bool:
        """Whether a request shows it; compared in constant time."""
        shown = bearer(headers)
        if not shown:
            return False
        try:
            found = self._path.stat()
            if self._seen != (found.st_mtime_ns, found.st_ino):
                self._digest = hashlib.sha256(self.read().encode()).digest()
                self._seen = (found.st_mtime_ns, found.st_ino)
        except (OSError, DeploymentError):
            return False
        return hmac.compare_digest(self._digest, hashlib.sha256(shown.encode()).digest())


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
