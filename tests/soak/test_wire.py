"""The wire between a site and its coordinator, and the clock that is made wrong."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.soak.wire import Shape, Wire

INJECTED = Path(__file__).parents[2] / "scripts" / "soak" / "injected"


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that gives back what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    while data := client.recv(65_536):
                        client.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_what_was_on_its_way_arrives_once_a_cut_wire_is_whole(echo: int) -> None:
    with Wire(echo) as wire, socket.create_connection(("127.0.0.1", wire.port)) as client:
        client.settimeout(0.3)
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        wire.shape.cut = True
        client.sendall(b"amid")
        with pytest.raises(TimeoutError):
            client.recv(100)
        wire.shape.cut = False
        client.settimeout(5)
        assert client.recv(100) == b"amid"


def test_a_slow_wire_takes_its_time(echo: int) -> None:
    shape = Shape(bytes_per_s=40_000, delay_s=0.05)
    with Wire(echo, shape) as wire, socket.create_connection(("127.0.0.1", wire.port)) as client:
        began, came = time.monotonic(), b""
        client.sendall(bytes(16_000))
        while len(came) < 16_000:
            came += client.recv(65_536)
        assert time.monotonic() - began >= 16_000 / 40_000 + 0.1


def test_an_end_passes_on(echo: int) -> None:
    with Wire(echo) as wire, socket.create_connection(("127.0.0.1", wire.port)) as client:
        client.settimeout(5)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""


def test_a_clock_is_wrong_while_a_process_runs(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_bytes(struct.pack("d", 3600.0))
    code = (
        "import struct, sys, time, datetime\n"
        "say = lambda: print(time.time(), datetime.datetime.now(datetime.UTC).timestamp())\n"
        "say()\n"
        "open(sys.argv[1], 'r+b').write(struct.pack('d', -3600.0))\n"
        "say()\n"
        "print(isinstance(datetime.datetime.now(), datetime.datetime))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(INJECTED), "FEDTUNE_SOAK_CLOCK": str(clock)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(clock)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ahead, behind, kept = done.stdout.splitlines()
    assert all(float(each) == pytest.approx(time.time() + 3600, abs=30) for each in ahead.split())
    assert all(float(each) == pytest.approx(time.time() - 3600, abs=30) for each in behind.split())
    assert kept == "True"
