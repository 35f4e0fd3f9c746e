"""The link's speed, against a server in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fedtune.devices.link import link_bytes_per_s
from fedtune.errors import ConfigError


class Handler(BaseHTTPRequestHandler):
    """`/BYTES` gives that many; `/trickle` gives 32 kB every 20 ms without end; all else is 404."""

    def do_GET(self) -> None:
        wanted = self.path.strip("/")
        if not (wanted.isdigit() or wanted == "trickle"):
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        try:
            if wanted == "trickle":
                while True:
                    self.wfile.write(bytes(32_000))
                    time.sleep(0.02)
            self.wfile.write(bytes(int(wanted)))
        except (BrokenPipeError, ConnectionResetError):
            return

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_speed_is_bytes_over_seconds(address: str) -> None:
    ticks = iter([0.0, 0.0, 0.0, *([0.5] * 10_000)])
    speed = link_bytes_per_s(f"{address}/1000000", clock=lambda: next(ticks))
    assert speed == pytest.approx(2_000_000)


def test_a_slow_server_is_read_for_as_long_as_allowed(address: str) -> None:
    started = time.perf_counter()
    speed = link_bytes_per_s(f"{address}/trickle", most_seconds=0.6)
    assert time.perf_counter() - started < 3
    assert 10_000 < speed <= 1.7 * 32_000 / 0.02


def test_no_more_is_read_than_allowed(address: str) -> None:
    # It would never end otherwise, and the time limit is far away.
    started = time.perf_counter()
    assert link_bytes_per_s(f"{address}/trickle", most_bytes=100_000, most_seconds=30) > 0
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/100", "expected at least 65536 bytes to measure with, got 100"),
        ("/nothing", r"the server answered 404 \(Not Found\)"),
    ],
)
def test_an_answer_that_says_nothing_is_refused(address: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        link_bytes_per_s(address + path)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "host/file", ""])
def test_only_web_addresses_are_read(url: str) -> None:
    with pytest.raises(ConfigError, match="needs an http:// or https:// address"):
        link_bytes_per_s(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://[::1/x", "http:///x"])
def test_an_address_where_nothing_answers_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--link .*") as refusal:
        link_bytes_per_s(url, most_seconds=1)
    assert "\n" not in str(refusal.value)
