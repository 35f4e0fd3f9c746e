"""Whether a process of this machine answers at its port."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable
from functools import partial

TIMEOUT_S = 5.0


def local_address(bind: str) -> str:
    """Where a process that listens on `bind` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(bind, bind)


def tcp(bind: str, port: int) -> Callable[[], bool]:
    """A question: are connections accepted?"""
    return partial(_accepts, local_address(bind), port)


def https(bind: str, port: int, path: str, *, plain: bool = False) -> Callable[[], bool]:
    """A question: does a request for a path succeed?

    Args:
        plain: plaintext is tried first, and TLS after it; by default the other way round.
    """
    return partial(_responds, local_address(bind), port, path, plain)


def _accepts(address: str, port: int) -> bool:
    with socket.create_connection((address, port), timeout=TIMEOUT_S):
        return True


def _responds(address: str, port: int, path: str, plain: bool) -> bool:
    try:
        return _asks(address, port, path, plain)
    except (ssl.SSLError, http.client.HTTPException, ConnectionResetError):
        return _asks(address, port, path, not plain)


def _asks(address: str, port: int, path: str, plain: bool) -> bool:
    connection: http.client.HTTPConnection
    if plain:
        connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
    else:
        # Whether it lives is asked, not who it is: a certificate that has just ended must not make
        # the supervisor kill a link that serves its sites.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(address, port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    finally:
        connection.close()
