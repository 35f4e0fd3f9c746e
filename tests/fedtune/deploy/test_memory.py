"""What threads have freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import re, sys, threading
from fedtune.deploy.memory import return_freed_memory
if sys.argv[1] == "yes":
    return_freed_memory()
def resident():
    return int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
barrier = threading.Barrier(12)
def work():
    for size in (600_000, 2_000_000, 5_000_000, 5_000_000):
        block = bytearray(size)
        kept = bytearray(200)
        del block
    barrier.wait()
    barrier.wait()
before = resident()
threads = [threading.Thread(target=work) for _ in range(11)]
for thread in threads: thread.start()
barrier.wait()
print(resident() - before)
barrier.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_threads_have_freed_is_not_kept() -> None:
    kept = {}
    for switch in ("yes", "no"):
        command = [sys.executable, "-c", HELD, switch]
        kept[switch] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert kept["yes"] < 4_000  # kB; twelve stacks and arenas
    assert kept["yes"] < kept["no"] / 2
