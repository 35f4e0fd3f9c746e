"""Tells systemd how a service is doing (sd_notify(3)): ready, stopping, alive.

Where NOTIFY_SOCKET is not set, nothing is sent. A message that cannot be sent is dropped: a service
manager that is busy must not stop a federation.
"""

from __future__ import annotations

import contextlib
import os
import socket

from fedtune.config import service_manager


class Notifier:
    """One service's line to its manager.

    Args:
        address: of the socket; `@` at its start is Linux's abstract name. Empty: say nothing.
        watchdog_s: the manager restarts a service that is silent for so long; 0: it does not.
    """

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._every_s = watchdog_s / 3
        self._alive_at = float("-inf")
        self._status = ""

    @classmethod
    def from_environment(cls) -> Notifier:
        """As the service manager has said it in the environment."""
        address, watchdog_us, watchdog_pid = service_manager()
        ours = watchdog_pid in ("", str(os.getpid()))
        watchdog_s = int(watchdog_us) / 1e6 if ours and watchdog_us.isdigit() else 0.0
        return cls(address, watchdog_s)

    def ready(self) -> None:
        """All processes have started."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def status(self, words: str) -> None:
        """One line for `systemctl status`; said again only when it changes."""
        if words != self._status:
            self._status = words
            self._send(f"STATUS={' '.join(words.split())}")

    def alive(self, now: float) -> None:
        """Feed the watchdog, as often as it needs.

        Args:
            now: seconds of a monotonic clock.
        """
        if self._every_s > 0 and now - self._alive_at >= self._every_s:
            self._alive_at = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        family = getattr(socket, "AF_UNIX", None)
        if not self._address or family is None:
            return
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as line:
            line.setblocking(False)
            line.sendto(message.encode(), self._address)
