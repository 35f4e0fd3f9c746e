from __future__ import annotations

import os
import re
import socket
import threading

import pytest

from fedtune.deploy.ports import check_ports
from fedtune.errors import DeploymentError
from tests.processes import free_ports


def test_a_port_that_is_taken_is_refused_with_its_owner() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = rf"service_port = {port}: the port is taken by process {os.getpid()} \("
        with pytest.raises(DeploymentError, match=words):
            check_ports({"service_port": ("127.0.0.1", port)}, wait_s=0)
        with pytest.raises(DeploymentError, match="taken"):
            check_ports({"service_port": ("0.0.0.0", port)}, wait_s=0)


def test_a_port_that_is_given_back_in_time_is_free() -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    timer = threading.Timer(0.3, taken.close)
    timer.start()
    check_ports({"port": ("127.0.0.1", port)}, wait_s=5)
    timer.join()


def test_one_port_for_two_uses_is_refused() -> None:
    port = free_ports(1)[0]
    words = re.escape(f"port and health_port are both {port}; give each a port of its own")
    with pytest.raises(DeploymentError, match=words):
        check_ports({"port": ("0.0.0.0", port), "health_port": ("127.0.0.1", port)})


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(DeploymentError, match=r"192\.0\.2\.1 port \d+ cannot be used"):
        check_ports({"port": ("192.0.2.1", free_ports(1)[0])}, wait_s=0)
