"""The batches that every contender of a benchmark trains on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workloads() -> ModuleType:
    """The scripts import it from their own folder, which is no package of the repository."""
    path = ROOT / "benchmarks" / "contenders" / "workloads.py"
    spec = importlib.util.spec_from_file_location("benchmark_workloads", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_same_numbers_give_the_same_batches(workloads: ModuleType) -> None:
    for workload in ("64", "ragged", "grouped"):
        first, second = (workloads.make_batches(workload, 100, 3) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            for one, other in zip(a, b, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


def test_ragged_samples_have_the_stated_lengths_and_prompts(workloads: ModuleType) -> None:
    samples = [s for batch in workloads.make_batches("ragged", 100, 100) for s in batch]
    lengths = np.array([len(s.tokens) for s in samples])
    assert lengths.min() >= 16
    assert lengths.max() <= 512
    assert 100 < np.median(lengths) < 120
    for sample in samples:
        assert int((~sample.loss_mask).sum()) == len(sample.tokens) // 2
        assert sample.loss_mask[-1]


def test_grouping_by_length_takes_most_of_the_padding_away(workloads: ModuleType) -> None:
    ragged, grouped = (
        np.mean([workloads.padding_factor(b) for b in workloads.make_batches(w, 100, 10)])
        for w in ("ragged", "grouped")
    )
    assert ragged > 1.7
    assert grouped < 1.1


def test_grouped_batches_stand_for_the_whole_pool(workloads: ModuleType) -> None:
    pool, some = (
        np.mean([workloads.real_tokens(b) for b in workloads.make_batches(*arguments)])
        for arguments in (("ragged", 100, workloads.POOL_BATCHES), ("grouped", 100, 10))
    )
    assert some == pytest.approx(pool, rel=0.05)


def test_padding_carries_no_loss_and_is_marked_absent(workloads: ModuleType) -> None:
    (batch,) = workloads.make_batches("ragged", 100, 1)
    padded = workloads.pad(batch)
    for row, sample in enumerate(batch):
        size = len(sample.tokens)
        assert padded.present[row].sum() == size
        assert (padded.labels[row, size:] == -100).all()
        expected = np.where(sample.loss_mask, sample.tokens, -100)
        np.testing.assert_array_equal(padded.labels[row, :size], expected)
