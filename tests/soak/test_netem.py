"""Namespaces reach each other, their links are as slow as they shall be, and nothing is left."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from scripts.soak.cable import Link, _Way
from scripts.soak.netem import Network, network, why_not

pytestmark = pytest.mark.deployment

SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    while True:
        peer, _ = server.accept()
        with peer:
            size = 0
            while data := peer.recv(65536):
                size += len(data)
                if data.endswith(b"."):
                    peer.sendall(str(size).encode())
                    break
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[3])) as peer:
    peer.sendall(b"x" * (int(sys.argv[2]) - 1) + b".")
    print(peer.recv(100).decode())
"""


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network(("coordinator", "site-1", "site-2")) as made:
        command = [sys.executable, "-c", SERVE, made.addresses["coordinator"]]
        server = subprocess.Popen(
            made.command("coordinator", command), stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield made
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def seconds(net: Network, host: str, size: int = 1, timeout_s: float = 20.0) -> float:
    """That it takes a host to send so many bytes and to hear that they have come."""
    command = [sys.executable, "-c", SEND, net.addresses["coordinator"], str(size), str(timeout_s)]
    started = time.monotonic()
    done = subprocess.run(
        net.command(host, command), capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) == size
    return time.monotonic() - started


def test_a_delay_counts_for_one_host_and_not_for_the_other(net: Network) -> None:
    net.shape("site-1", Link(delay_ms=400))
    slow, fast = seconds(net, "site-1"), seconds(net, "site-2")
    net.shape("site-1", Link())
    assert slow > 1.6  # there and back to connect, and once more for the answer
    assert fast < slow - 1.0


def test_a_rate_counts_and_is_taken_back(net: Network) -> None:
    net.shape("site-1", Link(rate="1mbit"))
    slow = seconds(net, "site-1", 250_000)
    net.shape("site-1", Link())
    assert slow > 1.5  # 2 Mbit, less what a first burst lets through
    assert seconds(net, "site-1", 250_000) < slow / 2


def test_loss_slows_and_breaks_nothing(net: Network) -> None:
    net.shape("site-2", Link(delay_ms=5, jitter_ms=2, loss_percent=5))
    seconds(net, "site-2", 200_000)
    net.shape("site-2", Link())


def test_a_cut_link_carries_nothing_until_it_is_healed(net: Network) -> None:
    net.cut("site-1")
    with pytest.raises(subprocess.CalledProcessError):
        seconds(net, "site-1", timeout_s=1.0)
    net.heal("site-1")
    seconds(net, "site-1")


def test_nothing_is_left() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with network(("a",)) as made:
        sleeper = subprocess.Popen(made.command("a", ["sleep", "60"]))
        time.sleep(0.2)
    assert sleeper.wait(timeout=5) == -9
    listed = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"{made.prefix}v" not in listed
    assert made.namespace("a") not in spaces


def test_a_link_is_written_as_tc_reads_it() -> None:
    link = Link(delay_ms=50, jitter_ms=5, loss_percent=1, rate="1mbit")
    words = ["netem", "delay", "50ms", "5ms", "loss", "1%", "rate", "1mbit"]
    assert link.words() == words
    assert Link(rate="1mbit").bytes_per_s == 125_000
    assert Link().words() == []


def test_a_cable_delays_loses_and_queues_what_its_link_says() -> None:
    way = _Way(random.Random(1))
    lossy = Link(delay_ms=50, jitter_ms=10, loss_percent=5)
    at = [way.leaves_at(lossy, 1000, float(second)) for second in range(10_000)]
    late = [when - second for second, when in enumerate(at) if when is not None]
    assert 0.94 < len(late) / len(at) < 0.96
    assert 0.049 < statistics.mean(late) < 0.051
    assert 0.009 < statistics.stdev(late) < 0.011
    slow = _Way(random.Random(1))
    queued = [slow.leaves_at(Link(rate="1mbit"), 1250, 0.0) for _ in range(100)]
    kept = [when for when in queued if when is not None]
    assert kept == pytest.approx([0.01 * (i + 1) for i in range(len(kept))])
    assert len(kept) in (50, 51)  # half a second of them
    jittery = [way.leaves_at(Link(delay_ms=20, jitter_ms=20), 1, 1e6 + i / 1e3) for i in range(99)]
    assert jittery == sorted(jittery)  # type: ignore[type-var]
