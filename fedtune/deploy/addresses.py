"""Hosts and ports as people write them."""

from __future__ import annotations

import ipaddress
import re

from fedtune.errors import DeploymentError, one_line

_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def check_host(host: str) -> str:
    """A host that a certificate can be made for: a DNS name or an IP address.

    Raises:
        DeploymentError: it is neither.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    labels = bare.removesuffix(".").split(".")
    if len(bare) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise DeploymentError(
            f"expected a host's name or address, such as fed.example.org or 10.0.0.5; found "
            f"{one_line(repr(host), 200)}"
        )
    return bare


def split_address(address: str, what: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, or of `[IPV6]:PORT`.

    Args:
        what: how an error calls it.

    Raises:
        DeploymentError: it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    found = one_line(repr(address), 200)
    expected = f"{what}: expected HOST:PORT, such as fed.example.org:9400; found {found}"
    if not colon or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65_535:
        raise DeploymentError(expected)
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise DeploymentError(f"{expected}: an IPv6 address stands in brackets")
    try:
        return check_host(host), int(port)
    except DeploymentError:
        raise DeploymentError(expected) from None


def join_address(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
