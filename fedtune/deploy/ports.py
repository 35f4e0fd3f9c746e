"""Whether the ports that are about to be used are free, and who has them if not."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Mapping

import psutil

from fedtune.errors import DeploymentError

_EVERY_S = 0.2


def check_ports(wanted: Mapping[str, tuple[str, int]], wait_s: float = 3.0) -> None:
    """Refuse to start where a port is taken.

    Args:
        wanted: settings key -> address and port.
        wait_s: how long a port may still be held by what ended a moment ago.

    Raises:
        DeploymentError: a port is taken, an address is not this machine's, or two keys ask for
            the same port.
    """
    seen: dict[int, str] = {}
    for key, (_, port) in wanted.items():
        if port in seen:
            raise DeploymentError(
                f"{seen[port]} and {key} are both {port}; give each a port of its own"
            )
        seen[port] = key
    until = time.monotonic() + wait_s
    for key, (address, port) in wanted.items():
        while (problem := _problem(address, port)) is not None:
            if time.monotonic() >= until:
                raise DeploymentError(f"{key} = {port}: {problem}")
            time.sleep(_EVERY_S)


def _problem(address: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform == "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            # Connections that ended a moment ago do not keep a server from its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            who = _who_listens(port)
            if who:
                return f"the port is taken by {who}; stop that, or choose another port"
            return (
                f"{address} port {port} cannot be used ({error.strerror}); choose another port "
                "or address"
            )
    return None


def _who_listens(port: int) -> str:
    """The process that has a port, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                if connection.pid is None:
                    return "another user's process"
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""
