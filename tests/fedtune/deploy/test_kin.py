"""A supervisor and its processes end together: each in a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.config import SUPERVISOR_VARIABLE
from fedtune.deploy import guard
from tests.processes import Processes, Started, free_ports, wait_for

SCRIPT = Path(__file__).with_name("supervised.py")
SLEEP = "print('up', flush=True); import time; time.sleep(60)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(60)"
)
WITH_OTHERS = (
    "import subprocess, time\n"
    "subprocess.Popen(['sleep', '61'])\n"
    "subprocess.Popen(['sleep', '62'], start_new_session=True)\n"
    "print('up', flush=True)\n"
    "time.sleep(60)"
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as started:
        yield started


def supervise(
    processes: Processes, home: Path, programs: dict[str, str], port: int = 0, **more: Any
) -> Started:
    home.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(home), str(port or free_ports(1)[0])]
    started = processes.start([*command, json.dumps(programs)], **more)
    wait_for(
        lambda: (
            started.output().count('"message": "up"') >= len(programs)
            or started.process.poll() is not None
        ),
        20,
        "all children wrote",
    )
    return started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_in_an_instant(processes: Processes, tmp_path: Path, number: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("it is ignored here, as under nohup, and so it is below")
    started = supervise(processes, tmp_path, {"a": SLEEP, "b": WITH_OTHERS})
    assert len(processes.living()) == 6  # supervisor, guard, a, b, and the two below b
    begun = time.monotonic()
    started.send(number)
    assert started.wait() == 0
    assert time.monotonic() - begun < 3  # without the wait that ends in a kill
    processes.assert_none_left(timeout_s=0)


def test_one_that_ignores_sigterm_is_killed_within_five_seconds(
    processes: Processes, tmp_path: Path
) -> None:
    started = supervise(processes, tmp_path, {"deaf": DEAF, "a": SLEEP})
    begun = time.monotonic()
    assert started.stop() == 0
    assert 3.4 < time.monotonic() - begun < 5
    processes.assert_none_left(timeout_s=0)
    status = json.loads((tmp_path / "logs" / "supervisor.json").read_text())
    assert status["state"] == "stopped"
    assert status["children"]["deaf"]["last_exit"] == -9


def test_a_second_signal_kills_at_once(processes: Processes, tmp_path: Path) -> None:
    started = supervise(processes, tmp_path, {"deaf": DEAF})
    begun = time.monotonic()
    started.send(signal.SIGTERM)
    wait_for(lambda: '"stopping"' in started.output(), 5, "it stops")
    started.send(signal.SIGINT)
    assert started.wait() == 0
    assert time.monotonic() - begun < 3  # without the wait that ends in a kill
    processes.assert_none_left(timeout_s=0)


def test_sigkill_of_the_supervisor_leaves_nothing(processes: Processes, tmp_path: Path) -> None:
    started = supervise(processes, tmp_path, {"deaf": DEAF, "b": WITH_OTHERS})
    started.send(signal.SIGKILL)
    started.wait()
    processes.assert_none_left(timeout_s=2)


def test_children_die_with_the_supervisor_even_without_the_guard(
    processes: Processes, tmp_path: Path
) -> None:
    started = supervise(processes, tmp_path, {"deaf": DEAF})
    started.send(signal.SIGSTOP)  # so that it does not start another guard
    guarding = next(p for p in processes.living() if any("guard.py" in w for w in p.cmdline()))
    guarding.kill()
    started.send(signal.SIGKILL)
    started.wait()
    processes.assert_none_left(timeout_s=2)


def test_the_guard_knows_the_mark_by_the_name_that_children_get() -> None:
    assert guard.VARIABLE == SUPERVISOR_VARIABLE


def test_a_guard_that_ended_is_started_again(processes: Processes, tmp_path: Path) -> None:
    def guards() -> list[psutil.Process]:
        return [p for p in processes.living() if any("guard.py" in w for w in p.cmdline())]

    started = supervise(processes, tmp_path, {"b": WITH_OTHERS})
    first = guards()[0]
    first.kill()
    wait_for(lambda: [g for g in guards() if g.pid != first.pid], 5, "another guard runs")
    started.send(signal.SIGKILL)
    started.wait()
    processes.assert_none_left(timeout_s=2)


def test_orphans_do_not_stay_as_zombies(processes: Processes, tmp_path: Path) -> None:
    program = (
        "import subprocess, time\n"
        "subprocess.run(['sh', '-c', 'sleep 0.2 & exit 0'])\n"
        "print('up', flush=True)\n"
        "time.sleep(60)"
    )
    started = supervise(processes, tmp_path, {"a": program})
    time.sleep(0.6)
    below = psutil.Process(started.pid).children()
    assert sorted(p.status() == psutil.STATUS_ZOMBIE for p in below) == [False, False]


def test_a_home_is_run_once_and_the_second_names_the_first(
    processes: Processes, tmp_path: Path
) -> None:
    first = supervise(processes, tmp_path, {"a": SLEEP})
    second = supervise(processes, tmp_path, {"a": SLEEP})
    assert second.wait() == 2
    assert f"{tmp_path} is already run by process {first.pid}; stop that one" in second.output()
    assert first.stop() == 0
    third = supervise(processes, tmp_path, {"a": SLEEP})
    assert third.stop() == 0


def test_systemd_is_told_and_its_socket_is_not_passed_on(
    processes: Processes, tmp_path: Path
) -> None:
    address = tmp_path / "notify"
    program = "import os, time; print('up', os.environ.get('NOTIFY_SOCKET')); time.sleep(60)"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(10)
        started = supervise(
            processes,
            tmp_path / "home",
            {"a": program.replace("'up', ", "'up'); print(")},
            environment={"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "300000"},
        )
        told: list[bytes] = []
        while told.count(b"WATCHDOG=1") < 3:
            told.append(manager.recv(1000))
        started.stop()
        while b"STOPPING=1" not in told:
            told.append(manager.recv(1000))
    assert b"READY=1" in told
    assert b"STATUS=healthy: a up" in told
    assert '"message": "None"' in started.output()


def test_health_and_metrics_are_served_and_a_crash_loop_is_503(
    processes: Processes, tmp_path: Path
) -> None:
    port = free_ports(1)[0]
    started = supervise(processes, tmp_path, {"a": SLEEP}, port)
    wait_for(lambda: get(port, "/health")[0] == 200, 10, "it is healthy")
    status, found = get(port, "/health")
    assert (status, found["state"], found["pid"]) == (200, "healthy", started.pid)
    assert found["children"]["a"]["state"] == "up"
    started.stop()

    crashing = "print('up', flush=True); raise ValueError('broken')"
    supervise(processes, tmp_path, {"a": crashing}, port)
    wait_for(lambda: get(port, "/health")[1]["children"]["a"]["crash_loop"], 10, "a crash loop")
    status, found = get(port, "/health")
    assert (status, found["state"]) == (503, "failing")
    assert found["children"]["a"]["last_error"] == "ValueError: broken"


def get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_guard_kills_the_groups_that_it_was_told_of_and_no_others(
    processes: Processes,
) -> None:
    """As where there is no /proc to look for marks in."""
    told, taken_back = (subprocess.Popen(["sleep", "30"], start_new_session=True) for _ in range(2))
    try:
        watching = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, "nobody-has-this-mark"],
            stdin=subprocess.PIPE,
        )
        watching.communicate(
            f"+{told.pid}\n+{taken_back.pid}\n-{taken_back.pid}\n".encode(), timeout=10
        )
        assert told.wait(5) == -signal.SIGKILL
        assert taken_back.poll() is None
    finally:
        for process in (told, taken_back):
            process.kill()
            process.wait()


def test_a_terminal_that_stands_still_stops_neither_the_work_nor_the_end(
    processes: Processes, tmp_path: Path
) -> None:
    program = "for i in range(2000): print('x' * 200)\nimport time; time.sleep(60)"
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(free_ports(1)[0])]
    log = tmp_path / "logs" / "a.log"
    with subprocess.Popen(
        [*command, json.dumps({"a": program})], stdout=subprocess.PIPE
    ) as supervisor:
        try:
            wait_for(lambda: log.exists() and log.read_text().count("\n") == 2000, 20, "all kept")
            supervisor.send_signal(signal.SIGTERM)
            assert supervisor.wait(5) == 0
        finally:
            supervisor.kill()
