"""Bounds what a connection may be before it is a request: nobody holds one by saying nothing.

uvicorn waits without end for the head of a request, and its faster parser takes one of any size;
both come before the guard sees anything.
"""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_BYTES = 65_536
HEAD_S = 30.0
"""From the connection, or the last answer, until the whole head is here."""


def bounded_heads(protocol: Any, most_bytes: int = HEAD_BYTES, within_s: float = HEAD_S) -> Any:
    """One of uvicorn's protocols for HTTP/1.1, which aborts connections that bring no request.

    Args:
        protocol: `H11Protocol` or `HttpToolsProtocol`; both tell by `cycle` what is under way.
        most_bytes: of a head, and of what comes with its end at once.
        within_s: for a head; between requests uvicorn's own `timeout_keep_alive` counts, too.
    """

    class BoundedHeads(protocol):  # type: ignore[misc]  # uvicorn's is chosen when it starts
        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._have_head()
                return
            self._head_bytes += len(data)
            if self._head_bytes > most_bytes:
                self.transport.abort()
            elif self._head_timer is None:
                self._await_head()

        def connection_lost(self, error: Exception | None) -> None:
            self._have_head()
            super().connection_lost(error)

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(within_s, self.transport.abort)

        def _have_head(self) -> None:
            self._head_bytes = 0
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return BoundedHeads


def link_protocol() -> Any:
    """The protocol that uvicorn would choose by itself, with its heads bounded."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    return bounded_heads(AutoHTTPProtocol)
