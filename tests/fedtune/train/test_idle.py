"""What a process holds when it is ready, and the allocator that keeps it to its plan."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from fedtune.devices import usage
from fedtune.devices.usage import peak_resident_bytes, resident_bytes, restart_peak
from fedtune.train.idle import SLACK_BYTES, call_seconds, ready_bytes, settle

_BLOCK = 64 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
glibc = pytest.mark.skipif(
    platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="for glibc"
)


@linux
def test_a_settled_process_holds_no_more_after_another_first_step() -> None:
    settle()
    before = resident_bytes()
    ready = ready_bytes()
    assert before is not None
    assert ready is not None
    assert 0 <= ready - SLACK_BYTES - before < 4 << 20


def test_calling_a_block_takes_some_of_a_millisecond() -> None:
    assert 1e-5 < call_seconds() < 0.1


@linux
def test_the_peak_starts_anew_from_what_is_held() -> None:
    with mmap.mmap(-1, _BLOCK) as block:
        block.write(bytes(_BLOCK))
    assert restart_peak()
    held, peak = resident_bytes(), peak_resident_bytes()
    assert held is not None
    assert peak is not None
    assert abs(peak - held) < 4 << 20
    # Mapped, because this process may keep what others freed.
    with mmap.mmap(-1, _BLOCK) as block:
        block.write(b"x" * _BLOCK)
    risen = peak_resident_bytes()
    assert risen is not None
    assert risen - peak > 0.9 * _BLOCK


def test_without_proc_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    monkeypatch.setattr(usage, "_STATUS", Path("/no/such/status"))
    monkeypatch.setattr(usage, "_CLEAR", Path("/no/such/folder/clear"))
    assert resident_bytes() is None
    assert ready_bytes() is None
    assert not restart_peak()


_FREED = """
import sys, torch
from fedtune.train.allocator import keep_what_fits
from fedtune.devices.usage import resident_bytes
assert keep_what_fits(100, int(sys.argv[1])) == (int(sys.argv[1]) >= 150)
torch.ones(4_000_000)
before = resident_bytes()
buffer = torch.ones(8_000_000)
del buffer
print(resident_bytes() - before)
"""


@glibc
@pytest.mark.parametrize(("budget", "kept"), [(100, False), (149, False), (150, True)])
def test_freed_buffers_are_kept_where_the_budget_has_room_for_gaps(budget: int, kept: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FREED, str(budget)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (int(done.stdout) > 8_000_000) == kept
