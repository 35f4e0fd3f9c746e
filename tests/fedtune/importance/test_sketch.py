"""Sketches that every device draws alike, and spectra read from them."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.importance.sketch import (
    one_sided_values,
    semidefinite_values,
    signs,
    two_sided_values,
)


def falling(out: int, inputs: int, power: float) -> np.ndarray:
    """A matrix whose singular values are 1, 2^-power, 3^-power, ..."""
    rng = np.random.default_rng(3)
    size = min(out, inputs)
    u, _ = np.linalg.qr(rng.normal(size=(out, size)))
    v, _ = np.linalg.qr(rng.normal(size=(inputs, size)))
    return (u * np.arange(1, size + 1.0) ** -power) @ v.T


def test_signs_are_the_same_bits_everywhere() -> None:
    # Recorded; other numbers would make devices of two versions send sketches that do not add up.
    found = signs(7, "layers.0.q", "right", 2, 8)
    assert found.tolist() == [[1, 1, -1, -1, 1, -1, -1, -1], [-1, -1, 1, -1, -1, -1, -1, 1]]
    assert found.dtype == np.int8


def test_signs_differ_by_seed_name_and_side_and_are_balanced() -> None:
    drawn = [
        signs(*key, 64, 32)  # type: ignore[arg-type]
        for key in ((0, "a", "right"), (1, "a", "right"), (0, "b", "right"), (0, "a", "left"))
    ]
    for i, one in enumerate(drawn):
        assert set(np.unique(one)) == {-1, 1}
        assert abs(one.mean()) < 0.1
        for other in drawn[:i]:
            assert abs((one * other).mean()) < 0.1


def test_two_sketches_give_the_leading_singular_values() -> None:
    g = falling(120, 90, 1.5)
    psi = signs(0, "g", "left", 49, 120)
    omega = signs(0, "g", "right", 90, 24)
    found = two_sided_values(g @ omega, psi @ g, psi)
    exact = np.linalg.svd(g, compute_uv=False)
    np.testing.assert_allclose(found[:8], exact[:8], rtol=0.05)
    loose = np.abs(one_sided_values(g @ omega)[:8] / exact[:8] - 1).max()
    assert loose > np.abs(found[:8] / exact[:8] - 1).max()


def test_a_matrix_of_less_rank_than_the_sketch_has_its_values_exactly() -> None:
    rng = np.random.default_rng(0)
    g = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30))
    psi, omega = signs(0, "g", "left", 25, 40), signs(0, "g", "right", 30, 12)
    found = two_sided_values(g @ omega, psi @ g, psi)
    np.testing.assert_allclose(found[:3], np.linalg.svd(g, compute_uv=False)[:3], rtol=1e-9)
    np.testing.assert_allclose(found[3:], 0.0, atol=1e-9)


@pytest.mark.parametrize("rank", [30, 4])
def test_a_sketch_of_a_covariance_gives_its_leading_eigenvalues(rank: int) -> None:
    x = falling(200, 30, 1.0)
    values, vectors = np.linalg.eigh(x.T @ x)
    c = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    omega = signs(0, "c", "inputs", 30, 16)
    found = semidefinite_values((c @ omega).astype(np.float32), omega)
    exact = values[::-1][:rank]
    np.testing.assert_allclose(found[:4], exact[:4], rtol=0.1)
    assert (found <= exact.max() * 1.001).all()


def test_an_empty_covariance_has_eigenvalues_of_nothing() -> None:
    omega = signs(0, "c", "inputs", 12, 5)
    np.testing.assert_allclose(semidefinite_values(np.zeros((12, 5)), omega), 0.0, atol=1e-20)
