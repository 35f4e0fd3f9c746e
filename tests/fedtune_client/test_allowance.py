"""What a site lets a plan take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedtune.devices.memory import free_memory
from fedtune.records import DeviceProfile
from fedtune_client import allowance as module
from fedtune_client.allowance import Allowance

MB = 10**6
SITE = DeviceProfile("east", "any", 1, 100 * MB)


def allowance(
    monkeypatch: pytest.MonkeyPatch, free: int, idle: int | None = 0, held: int | None = 0
) -> Allowance:
    """Of a site that measures, on a machine with so much free memory."""
    taken = iter([idle, held])
    monkeypatch.setattr(module, "own_memory_bytes", lambda: next(taken))
    monkeypatch.setattr(module, "free_memory", lambda: SimpleNamespace(free_bytes=free))
    return Allowance(SITE, measured=True)


def test_a_simulated_site_allows_what_its_class_says() -> None:
    simulated = Allowance(DeviceProfile("east", "any", 1, 10**18), measured=False)
    assert simulated.bytes_now() == 10**18
    assert simulated.profile_now().budget_bytes == 10**18


def test_a_site_allows_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allowance(monkeypatch, 500 * MB).bytes_now() == 100 * MB


def test_a_site_allows_what_is_free_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allowance(monkeypatch, 30 * MB).bytes_now() == 30 * MB


def test_what_its_own_training_holds_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allowance(monkeypatch, 30 * MB, 200 * MB, 245 * MB).bytes_now() == 75 * MB
    assert allowance(monkeypatch, 30 * MB, 200 * MB, 190 * MB).bytes_now() == 30 * MB


def test_the_limit_counts_where_the_system_does_not_say_what_a_process_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert allowance(monkeypatch, 30 * MB, None, None).bytes_now() == 100 * MB


def test_a_full_machine_still_allows_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of no memory cannot be sent."""
    site = allowance(monkeypatch, 0)
    assert site.profile_now().memory_bytes == 1


def test_an_accelerators_memory_is_what_it_and_torchs_cache_have_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = DeviceProfile(
        "east", "any", 1, MB, accelerator="cuda", accelerator_memory_bytes=100 * MB
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * MB, 200 * MB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 25 * MB)
    site = Allowance(card, measured=True)
    assert site.bytes_now() == 65 * MB
    now = site.profile_now()
    assert (now.memory_bytes, now.accelerator_memory_bytes) == (MB, 65 * MB)


WATCHES_ITSELF = """
import sys
import numpy as np
from fedtune.devices.usage import own_memory_bytes
before = own_memory_bytes()
array = np.ones(8 * 10**6)  # 64 MB
held = own_memory_bytes()
array.tofile(sys.argv[1])
mapped = np.memmap(sys.argv[1], np.float64, "r")
assert mapped.sum() == 8 * 10**6
print(held - before, own_memory_bytes() - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_what_a_process_takes_is_seen_and_mapped_files_are_not(tmp_path: Path) -> None:
    """In a process of its own: one that ran other tests takes memory that it had kept free."""
    command = [sys.executable, "-c", WATCHES_ITSELF, str(tmp_path / "numbers")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    taken, mapped = map(int, done.stdout.split())
    assert 60 * MB < taken < 80 * MB
    assert mapped < 10 * MB


def test_some_memory_of_this_machine_is_free() -> None:
    assert free_memory().free_bytes > MB
