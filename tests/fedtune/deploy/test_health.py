from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy.health import HealthServer, Identity, health_object, metrics_text, write_status
from fedtune.deploy.keeper import ChildReport
from fedtune.deploy.supervisor import Report


def report(state: str = "healthy", **more: object) -> Report:
    fields = {
        "name": "link", "state": "up", "pid": os.getpid(), "restarts": 3, "since_s": 1e9,
        "last_exit": -9, "last_error": "", "crash_loop": False, **more,
    }  # fmt: skip
    return Report(state, 1e9, (ChildReport(**fields),))  # type: ignore[arg-type]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HealthServer]:
    identity = Identity("north", "1.2", lambda: 12.345678, (tmp_path / "metrics.prom",))
    with HealthServer(0, report, identity) as running:
        yield running


def ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_health_says_who_and_how(server: HealthServer) -> None:
    status, content = ask(server, "/health")
    found = json.loads(content)
    assert status == 200
    assert (found["name"], found["version"], found["state"]) == ("north", "1.2", "healthy")
    assert found["certificate_days_left"] == 12.35
    assert found["children"]["link"] == {
        "state": "up", "pid": os.getpid(), "restarts": 3, "crash_loop": False,
        "since": "2001-09-09T01:46:40+00:00", "last_exit": -9, "last_error": "",
    }  # fmt: skip


@pytest.mark.parametrize("state", ["starting", "degraded", "failing", "stopping", "stopped"])
def test_all_but_healthy_is_503(state: str) -> None:
    with HealthServer(0, lambda: report(state), Identity("north", "1")) as running:
        assert ask(running, "/health")[0] == 503


def test_metrics_hold_figures_of_each_process_and_of_fresh_files(
    server: HealthServer, tmp_path: Path
) -> None:
    (tmp_path / "metrics.prom").write_text("fedtune_rounds_total 7")
    status, content = ask(server, "/metrics")
    text = content.decode()
    assert status == 200
    assert 'fedtune_child_up{child="link"} 1.0' in text
    assert 'fedtune_child_restarts_total{child="link"} 3.0' in text
    assert "fedtune_certificate_remaining_seconds 1.06666" in text
    assert "process_resident_memory_bytes" in text or os.name == "nt"
    assert text.endswith("fedtune_rounds_total 7\n")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values['fedtune_child_resident_bytes{child="link"}']) > 1e6
    assert float(values['fedtune_child_cpu_seconds_total{child="link"}']) > 0


def test_old_and_large_metric_files_are_left_out(tmp_path: Path) -> None:
    old, large = tmp_path / "old.prom", tmp_path / "large.prom"
    old.write_text("fedtune_old 1\n")
    os.utime(old, (time.time() - 100, time.time() - 100))
    large.write_text("fedtune_large 1\n" + "#" * 1_000_001)
    identity = Identity("n", "1", metric_files=(old, large, tmp_path / "none.prom"))
    text = metrics_text(report(), identity)
    assert b"fedtune_old" not in text
    assert b"fedtune_large" not in text


@pytest.mark.parametrize(
    "path", ["/", "/../etc/passwd", "/health/../../x", "/metrics%00", "/" + "a" * 5000]
)
def test_other_paths_are_404(server: HealthServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_it_is_read_only_and_for_this_machine_by_its_own_name(server: HealthServer) -> None:
    assert ask(server, "/health", "POST")[0] == 501
    assert ask(server, "/health", Host="evil.example")[0] == 403
    assert ask(server, "/health", Host="localhost")[0] == 200
    assert ask(server, "/health", "HEAD")[0:2] == (200, b"")


def test_peers_that_say_nothing_are_few_and_do_not_keep_others_out_for_long(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ("127.0.0.1", server.port)
    silent = [socket.create_connection(address) for _ in range(7)]
    try:
        assert ask(server, "/health")[0] == 200
        silent += [socket.create_connection(address) for _ in range(5)]
        silent[-1].settimeout(5)
        assert silent[-1].recv(10) == b""  # one too many: closed at once
    finally:
        for one in silent:
            one.close()


def test_the_status_file_is_replaced_whole_and_a_full_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, identity = tmp_path / "logs" / "supervisor.json", Identity("n", "1")
    write_status(path, report(), identity)
    assert json.loads(path.read_text()) == health_object(report(), identity)

    def full(*arguments: object, **more: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    write_status(path, report("failing"), identity)
    assert json.loads(path.read_text())["state"] == "healthy"


def test_long_errors_are_cut(tmp_path: Path) -> None:
    found = health_object(report(last_error="x" * 5000), Identity("n", "1"))
    assert len(found["children"]["link"]["last_error"]) == 1000
