from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy.notify import Notifier

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="systemd is Linux's")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(tmp_path / "n"))
        line.setblocking(False)
        yield line


def told(manager: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(manager.recv(1000))
        except BlockingIOError:
            return found


def test_each_word_is_one_message_and_a_status_is_said_once(
    manager: socket.socket, tmp_path: Path
) -> None:
    notifier = Notifier(str(tmp_path / "n"))
    notifier.ready()
    notifier.status("healthy:\na up")
    notifier.status("healthy:\na up")
    notifier.alive(0.0)  # no watchdog was asked for
    notifier.stopping()
    assert told(manager) == [b"READY=1", b"STATUS=healthy: a up", b"STOPPING=1"]


def test_the_watchdog_is_fed_three_times_per_period(manager: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "n"), watchdog_s=30.0)
    for second in range(31):
        notifier.alive(float(second))
    assert told(manager) == [b"WATCHDOG=1"] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_abstract_names_are_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(f"\0fedtune-test-{os.getpid()}")
        line.settimeout(1)
        Notifier(f"@fedtune-test-{os.getpid()}").ready()
        assert line.recv(100) == b"READY=1"


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(tmp_path: Path) -> None:
    Notifier("").ready()
    Notifier(str(tmp_path / "gone")).ready()


@pytest.mark.parametrize(("pid", "fed"), [("", 1), ("ours", 1), ("1", 0)])
def test_the_environment_is_read(
    manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: str, fed: int
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    Notifier.from_environment().alive(0.0)
    assert told(manager) == [b"WATCHDOG=1"] * fed
