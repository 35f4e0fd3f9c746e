"""Gain curves from the sums of a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedtune.importance.gains import comparable, measured_report, random_report
from fedtune.importance.sketch import signs
from fedtune.plan.ladder import global_rungs, make_ladder
from fedtune.plan.settings import PlanSettings
from fedtune.records import ImportanceReport, MatrixShape, ModelShapes
from fedtune.wire.calibration import (
    MEASURED_METHODS,
    MeasuredMethod,
    calibration_shapes,
    left_size,
    sketch_size,
)

RANK, SEED = 4, 3
MATRICES = (
    MatrixShape("layers.0.q", 24, 24, 0),
    MatrixShape("layers.0.up", 64, 24, 0),
    MatrixShape("layers.1.q", 24, 24, 1),
    MatrixShape("layers.1.k", 3, 24, 1),
)


def gradients(strong: str, factor: float = 5.0) -> dict[str, np.ndarray]:
    """One of rank 3 and some noise for each matrix; one matrix has larger ones."""
    rng = np.random.default_rng(0)
    found = {}
    for m in MATRICES:
        low = rng.normal(size=(m.out_features, 3)) @ rng.normal(size=(3, m.in_features))
        noise = 0.1 * rng.normal(size=low.shape)
        found[m.name] = (low + noise) * (factor if m.name == strong else 1.0)
    return found


def sums_of(method: MeasuredMethod, strong: str) -> dict[str, np.ndarray]:
    """What devices would send whose gradients, inputs, weights are larger in one matrix."""
    found: dict[str, np.ndarray] = {}
    for m in MATRICES:
        g = gradients(strong)[m.name]
        size = sketch_size(RANK, m.out_features, m.in_features)
        parts: dict[str, np.ndarray] = {}
        if method == "spectrum":
            omega = signs(SEED, m.name, "right", m.in_features, size)
            psi = signs(SEED, m.name, "left", left_size(size), m.out_features)
            parts = {"right": g @ omega, "left": psi @ g, "weight": np.array([8.0])}
        elif method == "activation":
            omega = signs(SEED, m.name, "inputs", m.in_features, size)
            # Of the variance, the strong one has more in its first directions.
            x = g / (5.0 if m.name == strong else 1.0)
            if m.name != strong:
                x = x + 2.0 * np.random.default_rng(1).normal(size=x.shape)
            parts = {"inputs": x.T @ x @ omega, "energy": np.array([(x**2).sum()])}
        elif method == "adalora":
            score = np.abs(np.random.default_rng(2).normal(size=min(RANK, *g.shape))) + 0.5
            score *= 5.0 if m.name == strong else 1.0
            parts = {"score": 2 * score, "square": 2 * score**2 * 1.5}
        else:
            parts = {"sensitivity": np.array([np.abs(g).sum()])}
        found |= {f"{m.name}.{part}": v.astype(np.float32) for part, v in parts.items()}
    shapes = calibration_shapes(method, RANK, MATRICES)
    assert {n: v.shape for n, v in found.items()} == shapes
    return found


def report_of(method: MeasuredMethod, sums: Mapping[str, Any], **changes: Any) -> ImportanceReport:
    fields: dict[str, Any] = {"tokens": 100, "passes": 2}
    return measured_report(method, sums, MATRICES, RANK, SEED, **{**fields, **changes})


@pytest.mark.parametrize("method", MEASURED_METHODS)
@pytest.mark.parametrize("strong", ["layers.0.q", "layers.1.q"])
def test_what_is_larger_in_the_sums_gains_more(method: MeasuredMethod, strong: str) -> None:
    report = report_of(method, sums_of(method, strong))
    gains = report.gain_per_rank
    assert (report.method, report.tokens) == (method, 100)
    other = next(m.name for m in MATRICES if m.name.endswith("q") and m.name != strong)
    assert gains[strong][0] > gains[other][0]


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_curves_are_positive_and_fall_and_are_shares_of_the_whole(method: MeasuredMethod) -> None:
    gains = report_of(method, sums_of(method, "layers.0.up")).gain_per_rank
    assert {name: len(curve) for name, curve in gains.items()} == {
        "layers.0.q": 4,
        "layers.0.up": 4,
        "layers.1.q": 4,
        "layers.1.k": 3,
    }
    for curve in gains.values():
        assert min(curve) > 0
        assert list(curve) == sorted(curve, reverse=True)
    assert sum(map(sum, gains.values())) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_the_last_digits_of_the_sums_change_nothing(method: MeasuredMethod) -> None:
    sums = sums_of(method, "layers.0.up")
    near = {name: value.astype(np.float64) * (1 + 1e-12) for name, value in sums.items()}
    assert report_of(method, sums) == report_of(method, near)


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_sums_of_nothing_give_equal_gains(method: MeasuredMethod) -> None:
    zeros = {n: np.zeros(s) for n, s in calibration_shapes(method, RANK, MATRICES).items()}
    gains = report_of(method, zeros).gain_per_rank
    assert all(gain > 0 for curve in gains.values() for gain in curve)


def test_ranks_follow_the_gradient_and_nest() -> None:
    shapes = ModelShapes("d", "llama", 24, 64, 2, 2, 50, MATRICES, 0)
    settings = PlanSettings(RANK, 16, 4, 3, 32)
    report = report_of("spectrum", sums_of("spectrum", "layers.1.q"))
    ladder = make_ladder(global_rungs(shapes, settings, RANK, report), 2, RANK)
    half = ladder.ranks(len(ladder) // 2)
    assert half["layers.1.q"] == max(half.values())
    for length in range(len(ladder)):
        less, more = ladder.ranks(length), ladder.ranks(length + 1)
        assert all(more[name] >= rank for name, rank in less.items())


def test_chance_gives_the_same_gains_to_all_who_draw_with_one_seed() -> None:
    first = random_report(MATRICES, RANK, 1)
    assert first == random_report(tuple(reversed(MATRICES)), RANK, 1)
    assert first.gain_per_rank != random_report(MATRICES, RANK, 2).gain_per_rank
    assert (first.method, first.tokens) == ("random", 0)
    for curve in first.gain_per_rank.values():
        assert list(curve) == sorted(curve, reverse=True)


def test_a_curve_that_rises_is_held_down() -> None:
    found = comparable({"a": np.array([1.0, 3.0]), "b": np.array([0.0, 0.0])})
    assert found["a"] == (0.5, 0.5)
    assert all(gain > 0 for gain in found["b"])
