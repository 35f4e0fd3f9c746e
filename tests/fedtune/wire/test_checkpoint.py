from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import RunError
from fedtune.records import GlobalAdapter, LowRank
from fedtune.wire.checkpoint import (
    as_written,
    find_checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)


def low_rank(rng: np.random.Generator, out: int, rank: int, inner: int) -> LowRank:
    # u as a transposed view: its bytes do not lie in the order of its elements
    u = rng.standard_normal((rank, out)).astype(np.float32).T
    sigma = np.sort(rng.random(rank).astype(np.float32))[::-1]
    return LowRank(u, sigma, rng.standard_normal((inner, rank)))


def adapter(round_number: int = 7, seed: int = 0) -> GlobalAdapter:
    rng = np.random.default_rng(seed)
    return GlobalAdapter(
        round=round_number,
        matrices={
            "layers.10.q_proj": low_rank(rng, 6, 3, 4),
            "layers.2.q_proj": low_rank(rng, 5, 0, 4),
        },
        dense={"classifier.weight": rng.standard_normal((2, 4)).astype(np.float32)},
        dropped_energy={"layers.10.q_proj": 0.125},
    )


def assert_same(found: GlobalAdapter, expected: GlobalAdapter) -> None:
    assert found.round == expected.round
    assert list(found.matrices) == list(expected.matrices)
    assert found.dropped_energy == expected.dropped_energy
    for name, low in expected.matrices.items():
        for factor in ("u", "sigma", "v"):
            written, read = getattr(low, factor), getattr(found.matrices[name], factor)
            assert read.dtype == written.dtype
            np.testing.assert_array_equal(read, written)
    assert list(found.dense) == list(expected.dense)
    for name, array in expected.dense.items():
        np.testing.assert_array_equal(found.dense[name], array)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    extra = {"momentum": adapter(seed=1)}
    path = write_checkpoint(tmp_path / "new", adapter(), extra, {"base_digest": "ab"})
    found = read_checkpoint(path)
    assert path.name == "round-0007.safetensors"
    assert_same(found.adapter, adapter())
    assert found.extra.keys() == {"momentum"}
    assert_same(found.extra["momentum"], extra["momentum"])
    assert found.meta == {"base_digest": "ab"}


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    meta = {name: "x" for name in "abcdefgh"}
    first = write_checkpoint(tmp_path / "1", adapter(), {"m": adapter()}, meta)
    meta = {name: "x" for name in "hgfedcba"}
    second = write_checkpoint(tmp_path / "2", adapter(), {"m": adapter()}, meta)
    assert first.read_bytes() == second.read_bytes()


def test_the_digest_beside_a_checkpoint_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, adapter())
    line = (tmp_path / "round-0007.safetensors.sha256").read_text(encoding="utf-8")
    assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    assert len(list(tmp_path.iterdir())) == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty_digest(path: Path) -> None:
    path.with_name(path.name + ".sha256").write_text("", encoding="utf-8")


def forge(path: Path) -> None:
    path.write_bytes(b"not safetensors")
    digest = hashlib.sha256(b"not safetensors").hexdigest()
    path.with_name(path.name + ".sha256").write_text(digest, encoding="utf-8")


@pytest.mark.parametrize("damage", [truncate, flip, empty_digest, forge, Path.unlink])
def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    path = write_checkpoint(tmp_path, adapter())
    damage(path)
    with pytest.raises(RunError, match=r"round-0007\.safetensors .*to continue from the round"):
        read_checkpoint(path)


def test_the_latest_checkpoint_is_that_of_the_highest_round(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None
    for number in (0, 10001, 9999):
        write_checkpoint(tmp_path, replace(adapter(), round=number))
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "round-10001.safetensors"


def test_a_checkpoint_without_its_final_name_does_not_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, adapter(3))
    (tmp_path / "round-0004.safetensors.partial").write_bytes(b"torn")
    (tmp_path / "round-0004.safetensors.sha256").write_text("ab", encoding="utf-8")
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "round-0003.safetensors"


def test_pruning_keeps_the_newest_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, adapter(number))
    (tmp_path / "round-0004.safetensors.partial").write_bytes(b"torn")
    (tmp_path / "round-0004.safetensors.sha256").write_text("ab", encoding="utf-8")
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        "round-0002.safetensors",
        "round-0002.safetensors.sha256",
        "round-0003.safetensors",
        "round-0003.safetensors.sha256",
    ]


def test_pruning_keeps_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        prune_checkpoints(tmp_path, keep=0)


def test_the_newest_that_is_whole_is_found_and_the_others_are_put_aside(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing") is None
    for number in (8, 9, 10, 11):
        write_checkpoint(tmp_path, adapter(number))
    truncate(tmp_path / "round-0011.safetensors")
    (tmp_path / "round-0010.safetensors.sha256").unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert_same(found.checkpoint.adapter, adapter(9))
    newest, before = found.skipped
    assert "round-0011.safetensors is damaged: expected sha256" in newest
    assert "round-0010.safetensors cannot be read" in before
    assert sorted(path.name for path in tmp_path.glob("*.damaged")) == [
        "round-0010.safetensors.damaged",
        "round-0011.safetensors.damaged",
    ]
    assert latest_checkpoint(tmp_path) == tmp_path / "round-0009.safetensors"
    assert not (tmp_path / "round-0011.safetensors.sha256").exists()
    again = find_checkpoint(tmp_path)
    assert again is not None
    assert again.skipped == ()


def test_if_none_is_whole_the_newest_says_why(tmp_path: Path) -> None:
    for number in (1, 2):
        truncate(write_checkpoint(tmp_path, adapter(number)))
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole; the newest: .*round-0002"):
        find_checkpoint(tmp_path)


def test_a_state_is_laid_out_as_it_would_be_read(tmp_path: Path) -> None:
    """An array of another layout may be summed in another order, and round otherwise."""
    laid_out = as_written(adapter())
    assert_same(laid_out, adapter())
    read = read_checkpoint(write_checkpoint(tmp_path, adapter())).adapter
    for name, pair in laid_out.matrices.items():
        for factor in ("u", "sigma", "v"):
            ours, theirs = getattr(pair, factor), getattr(read.matrices[name], factor)
            assert ours.flags.c_contiguous
            assert theirs.flags.c_contiguous
