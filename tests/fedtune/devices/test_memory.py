"""Memory that is really free: a limit that is set is a limit that is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedtune.devices.memory import free_memory
from fedtune.devices.processor import processor_name, usable_cores

LIMITED = """
import mmap, resource
from fedtune.devices.memory import free_memory
limit = 3 * 10**9
resource.setrlimit(resource.{kind}, (limit, limit))
found = free_memory()
print(found.free_bytes, found.limit, sep=",")
# Private and never touched: it counts as taken, and takes no memory of the machine.
mmap.mmap(-1, {share} * found.free_bytes // 100, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
"""


def test_free_memory_is_about_what_the_system_says() -> None:
    found = free_memory()
    machine = psutil.virtual_memory()
    assert 0 < found.free_bytes <= found.total_bytes == machine.total
    if found.limit == "machine":
        assert abs(found.free_bytes - machine.available) < 0.2 * machine.total


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are asked of Linux only")
@pytest.mark.parametrize(
    ("kind", "limit"), [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")]
)
def test_the_limit_of_a_process_is_what_can_be_had(kind: str, limit: str) -> None:
    free, name = run_limited(kind, 95).stdout.split(",")
    assert name.strip() == limit
    assert 10**9 < int(free) < 3 * 10**9


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are asked of Linux only")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_more_than_that_cannot_be_had(kind: str) -> None:
    assert "Cannot allocate memory" in run_limited(kind, 103).stderr


def run_limited(kind: str, share: int) -> subprocess.CompletedProcess[str]:
    """Take a share, in percent, of what a limited process is told is free."""
    code = LIMITED.format(kind=kind, share=share)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (share < 100), done.stderr
    return done


def test_the_processor_has_a_name_and_a_core() -> None:
    assert processor_name()
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\nmodel\t\t: 1\n", "AMD EPYC"),
        (
            "processor\t: 0\nRevision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B\n",
            "Raspberry Pi 5",
        ),
    ],
)
def test_a_processor_is_named_as_the_kernel_names_it(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text, encoding="utf-8")
    assert processor_name(tmp_path).startswith(name)


def test_a_processor_without_a_name_is_its_architecture(tmp_path: Path) -> None:
    assert processor_name(tmp_path)
