"""Hostile devices of the benchmark do what their names say, and the benchmark runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtune.aggregate.geometry import difference
from fedtune.records import Dispatch, LoraFactors
from fedtune.wire.packing import pack_tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import robust
from hostile.attacks import SCALE, Gang, reversed_words, spoil, tamper

ROOT = Path(__file__).resolve().parents[2]


def device(rank: int, seed: int = 0) -> tuple[Dispatch, dict[str, LoraFactors]]:
    """What a device was sent and what it learnt: a small change."""
    rng = np.random.default_rng(seed)
    start = LoraFactors(
        rng.standard_normal((8, 9))[:rank].astype(np.float32),
        rng.standard_normal((7, 8))[:, :rank].astype(np.float32),
        2.0,
    )
    moves = [rng.standard_normal(shape) * 1e-2 for shape in (start.a.shape, start.b.shape)]
    a, b = (start.a + moves[0]).astype(np.float32), (start.b + moves[1]).astype(np.float32)
    return Dispatch({"w": start}), {"w": LoraFactors(a, b, 2.0)}


def change(sent: Dispatch, factors: object) -> np.ndarray:
    pair = difference(sent.trained["w"], factors["w"])  # type: ignore[index]
    return np.asarray(pair.left @ pair.right.T)


def attacked(attack: str, rank: int = 4, gang: Gang | None = None, seed: int = 0) -> np.ndarray:
    sent, trained = device(rank, seed)
    rng = np.random.default_rng(1)
    return change(sent, tamper(attack, gang or Gang(), 1, sent, trained, rng))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(one * other) / (np.linalg.norm(one) * np.linalg.norm(other)))


def test_each_attack_changes_the_update_as_its_name_says() -> None:
    honest = change(*device(4))
    flipped, scaled, noise = (attacked(name) for name in ("sign-flip", "scaled", "noise"))
    assert cosine(flipped, honest) < -0.99
    assert np.linalg.norm(flipped) == pytest.approx(np.linalg.norm(honest), rel=0.05)
    assert np.linalg.norm(scaled) > SCALE / 2 * np.linalg.norm(honest)
    assert np.linalg.norm(noise) < 2 * np.linalg.norm(honest)
    assert abs(cosine(noise, honest)) < 0.5
    np.testing.assert_array_equal(attacked("poisoned"), honest)
    assert reversed_words("a b c") == "c b a"


def test_colluders_of_other_ranks_send_the_change_of_the_first() -> None:
    """On the directions that they share; a device of higher rank changes nothing on its others."""
    gang = Gang()
    sent, trained = device(4)
    told = gang.change(1, sent, trained, -2.0)
    larger, learnt = device(8, seed=0)
    same = gang.change(1, larger, learnt, -2.0)
    for side in ("a", "b"):
        mine = getattr(told["w"], side) - getattr(sent.trained["w"], side)
        theirs = getattr(same["w"], side) - getattr(larger.trained["w"], side)
        cut = theirs[:4] if side == "a" else theirs[:, :4]
        rest = theirs[4:] if side == "a" else theirs[:, 4:]
        np.testing.assert_allclose(cut, mine, atol=1e-6)
        assert not rest.any()


@pytest.mark.parametrize("attack", ["nan", "inf"])
def test_one_value_is_not_finite(attack: str) -> None:
    packed = pack_tensors({"w.a": np.ones((2, 3), np.float32)}, "float32")
    spoilt = np.frombuffer(spoil(attack, packed)[-24:], np.float32)
    assert np.isfinite(spoilt[:-1]).all()
    assert not np.isfinite(spoilt[-1])
    assert spoil("scaled", packed) == packed


def test_the_table_marks_what_stays_within_the_claim() -> None:
    size = robust.SMOKE
    losses = {cell.key: 2.0 for cell in robust.cells(size)}
    losses |= {"none: sign-flip 20%": 2.11, "multi-krum: sign-flip 20%": 2.09, "multi-krum": 1e9}
    clean, flipped = robust.loss_rows(losses, size)
    assert (clean["none"], clean["multi-krum"]) == ("**2.000**", "diverged")
    assert (flipped["attack"], flipped["hostile"]) == ("sign-flip", "20 %")
    assert (flipped["none"], flipped["multi-krum"]) == ("2.110", "**2.090**")


@pytest.mark.slow
@pytest.mark.soak
def test_the_benchmark_runs_from_end_to_end(shared_folder: Path) -> None:
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    script = [sys.executable, str(ROOT / "benchmarks" / "robust.py")]
    options = ["--smoke", "--json", "--shared", str(shared_folder)]
    ran = subprocess.run([*script, *options], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found.keys() == {cell.key for cell in robust.cells(robust.SMOKE)}
    assert all(0 < loss < 10 for loss in found.values())
