"""Connections that bring no request are cut, by both of uvicorn's parsers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedtune_server.link.heads import bounded_heads

PARSERS: list[Any] = [H11Protocol]
try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:
    pass
else:
    PARSERS.append(HttpToolsProtocol)

WITHIN_S, MOST_BYTES = 0.4, 20_000
REQUEST = b"POST / HTTP/1.1\r\nhost: link\r\ncontent-length: %d\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    head = [(b"content-length", b"7")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": b"%7d" % size})


@pytest.fixture(params=PARSERS, ids=lambda each: each.__name__)
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=bounded_heads(request.param, MOST_BYTES, WITHIN_S),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(5)
    listener.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def is_cut(connection: socket.socket) -> bool:
    """Whether the server ends the connection without an answer."""
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("said", [b"", b"POST / HTTP/1.1\r\nhost: li"])
def test_who_says_nothing_or_half_is_cut(port: int, said: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(said)
        started = time.monotonic()
        assert is_cut(connection)
        assert time.monotonic() - started < 3


def test_a_head_that_drips_is_cut_all_the_same(port: int) -> None:
    with connect(port) as connection:
        started = time.monotonic()
        try:
            connection.sendall(b"POST / HTTP/1.1\r\n")
            while time.monotonic() - started < 3:
                connection.sendall(b"x: y\r\n")
                time.sleep(0.05)
        except ConnectionError:
            pass
        assert time.monotonic() - started < 3


def test_a_head_without_end_is_not_kept(port: int) -> None:
    with connect(port) as connection:
        sent = 0
        try:
            connection.sendall(b"POST / HTTP/1.1\r\nx: ")
            while sent < 100 * MOST_BYTES:
                connection.sendall(bytes([97]) * 1000)
                sent += 1000
                time.sleep(0.001)
        except ConnectionError:
            pass
        assert sent < 50 * MOST_BYTES


def test_bodies_may_be_long_and_slow_and_connections_used_again(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(REQUEST % (3 * MOST_BYTES))
            for _ in range(3):
                time.sleep(WITHIN_S / 2)
                connection.sendall(bytes(MOST_BYTES))
            answer = b""
            while not answer.endswith(b"%7d" % (3 * MOST_BYTES)):
                answer += connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
