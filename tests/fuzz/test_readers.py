"""Readers of bytes from outside return or refuse, whatever they are given.

Ten thousand inputs here; `python -m scripts.soak fuzz` tries a million.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from fedtune.errors import ProtocolError
from scripts.soak.fuzz import Finding, fuzz, keep, try_one, unlike
from scripts.soak.targets import Target, all_targets


@pytest.mark.slow
def test_ten_thousand_inputs_find_nothing(tmp_path: Path) -> None:
    # In a process of its own, whose memory is bounded.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        done = pool.submit(fuzz, 10_000, 2026).result()
    assert done.inputs >= 10_000
    assert done.refused > done.inputs / 3  # inputs do get past the first checks, and not past all
    assert done.refused < done.inputs
    kept = keep(unlike(done.findings), tmp_path)
    assert not kept, [(f.target, f.what) for f in unlike(done.findings)]


def test_every_reader_takes_the_bytes_that_are_mutated(tmp_path: Path) -> None:
    for target in all_targets(tmp_path):
        if target.name.startswith(("service", "records", "manifest")):
            continue  # their seeds are made of odd values already
        for seed in target.seeds:
            wrong, refused, _ = try_one(target, seed)
            assert (wrong, refused) == ("", False), target.name


def _target(read: object) -> Target:
    return Target("x", (b"seed",), (lambda data, rng: data,), read)  # type: ignore[arg-type]


def _raise(error: Exception) -> object:
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("q"), "KeyError"),
        (MemoryError(), "MemoryError"),
        (ProtocolError("two\nlines"), "not printable"),
        (ProtocolError("\x1b[2J"), "not printable"),
        (ProtocolError("x" * 3000), "3000 characters"),
        (ProtocolError(""), "without words"),
        (ProtocolError("expected 1, got 2"), ""),
    ],
    ids=repr,
)
def test_what_counts_as_a_finding(error: Exception, words: str) -> None:
    wrong, refused, _ = try_one(_target(lambda data: _raise(error)), b"")
    assert words in wrong
    assert bool(wrong) == bool(words)
    assert refused == isinstance(error, ProtocolError)


def test_equal_seeds_give_equal_inputs(tmp_path: Path) -> None:
    for target in all_targets(tmp_path):
        first, second = (
            [target.input(rng) for _ in range(20)]
            for rng in (random.Random("7 x"), random.Random("7 x"))
        )
        assert first == second, target.name


def test_findings_of_one_kind_are_told_once_and_their_inputs_are_kept(tmp_path: Path) -> None:
    findings = [Finding("a b", 1, "KeyError", data) for data in (b"1", b"2")]
    findings.append(Finding("a b", 1, "TypeError", b"3"))
    (one, other) = unlike(findings)
    assert [path.read_bytes() for path in keep([one, other], tmp_path / "kept")] == [b"1", b"3"]
