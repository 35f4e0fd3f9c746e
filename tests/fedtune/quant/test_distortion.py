from __future__ import annotations

import math

import pytest

from fedtune.records import MatrixForm

torch = pytest.importorskip("torch")

from fedtune.quant.distortion import distortion, measure_distortion  # noqa: E402

FORMS = (MatrixForm("bf16"), MatrixForm("q4", 64), MatrixForm("q2", 64), MatrixForm("q2", 64, 4))


def matrices() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"m{i}", torch.randn(32, 64, generator=generator) * 10.0**-i) for i in range(3)]


def test_fewer_bits_lose_more_and_a_pair_repairs() -> None:
    table = measure_distortion(matrices(), FORMS, "digest")
    assert (table.base_digest, table.forms, list(table.errors)) == (
        "digest",
        FORMS,
        ["m0", "m1", "m2"],
    )
    for bf16, q4, q2, repaired in table.errors.values():
        assert 0 < bf16 < q4 < repaired < q2


def test_the_error_scales_with_the_square_of_the_weights() -> None:
    weight = matrices()[0][1]
    for form in FORMS:
        assert distortion(4 * weight, form) == pytest.approx(
            16 * distortion(weight, form), rel=1e-3
        )


def test_a_pair_of_full_rank_cannot_be_had() -> None:
    assert math.isinf(distortion(torch.ones(4, 64), MatrixForm("q2", 64, 4)))
    assert distortion(torch.ones(4, 64), MatrixForm("q2", 64, 3)) < 1e-3


def test_every_matrix_is_told() -> None:
    told: list[str] = []
    measure_distortion(matrices(), FORMS[:1], "digest", told.append)
    assert told == ["m0", "m1", "m2"]


def test_weights_change_the_measure() -> None:
    weight, form = matrices()[0][1], MatrixForm("q2", 64)
    heavy = distortion(weight, form, column_weights=torch.full((64,), 3.0))
    assert heavy == pytest.approx(3 * distortion(weight, form), rel=1e-5)
