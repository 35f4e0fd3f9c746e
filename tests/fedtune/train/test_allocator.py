"""The allocator settings of a device process, each tried in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_ONE_BUFFER = """
import ctypes, sys
import torch
from fedtune.train.allocator import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "mapped",
        "usmblks", "fsmblks", "used", "free", "keep",
    )]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
if sys.argv[1] == "kept":
    assert keep_freed_memory()
    assert keep_freed_memory()
before = mallinfo()
buffer = torch.ones(4_000_000)
mapped = mallinfo().mapped - before.mapped
del buffer
print(mapped, mallinfo().free - before.free)
"""
_BUFFER_BYTES = 16_000_000


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="for glibc"
)
@pytest.mark.parametrize("way", ["left", "kept"])
def test_a_large_buffer_stays_in_the_process_when_it_is_freed(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ONE_BUFFER, way],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    mapped, free = (int(number) for number in done.stdout.split())
    if way == "kept":
        assert mapped == 0
        assert free >= 0.9 * _BUFFER_BYTES
    else:
        assert mapped >= _BUFFER_BYTES
        assert free < 0.1 * _BUFFER_BYTES


def test_another_system_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.train import allocator

    monkeypatch.setattr(allocator.platform, "system", lambda: "Darwin")
    assert not allocator._set_glibc()


_CUDA = """
import os
from fedtune.train.allocator import keep_freed_memory
keep_freed_memory()
print(os.environ["PYTORCH_CUDA_ALLOC_CONF"])
"""


@pytest.mark.parametrize(
    ("chosen", "found"),
    [(None, "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")],
)
def test_a_users_own_cuda_setting_is_left_alone(
    chosen: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if chosen is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", chosen)
    done = subprocess.run(
        [sys.executable, "-c", _CUDA], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == found
