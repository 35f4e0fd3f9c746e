from __future__ import annotations

from itertools import pairwise

import pytest

from fedtune.records import BLOCK_BITS, FormatName, MatrixForm

torch = pytest.importorskip("torch")

from fedtune.quant.correction import (  # noqa: E402
    correction_of,
    leading_directions,
    squared_error,
    store_corrected,
)
from fedtune.quant.storage import store  # noqa: E402

LOSSY: list[FormatName] = [name for name, bits in BLOCK_BITS.items() if bits <= 4]


def weight(out_features: int = 96, in_features: int = 160, seed: int = 0) -> torch.Tensor:
    """Noise with a few strong directions, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out_features, in_features, generator=generator) * 0.02
    left = torch.randn(out_features, 6, generator=generator)
    right = torch.randn(6, in_features, generator=generator)
    return noise + 0.01 * left @ right


@pytest.mark.parametrize("format_name", LOSSY)
def test_more_rank_never_leaves_more_error(format_name: FormatName) -> None:
    w = weight()
    errors = [
        squared_error(w, *store_corrected(w, MatrixForm(format_name, 64, rank)))
        for rank in (0, 1, 2, 4, 8, 16, 32)
    ]
    assert all(more < less for less, more in pairwise(errors))


def test_without_rank_the_matrix_is_stored_as_ever() -> None:
    w = weight()
    stored, pair = store_corrected(w, MatrixForm("q2", 64))
    assert pair is None
    assert torch.equal(
        stored.values(torch.float32), store(w, MatrixForm("q2", 64)).values(torch.float32)
    )


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_more_turns_never_leave_more_error(turns: int) -> None:
    """The best turn is kept: one more can only help, whatever it gives."""
    for seed in range(4):
        w = weight(seed=seed)
        form = MatrixForm("q2", 64, 4)
        fewer = squared_error(w, *store_corrected(w, form, turns=turns))
        assert squared_error(w, *store_corrected(w, form, turns=turns + 1)) <= fewer


def test_turns_beat_repairing_the_plain_matrix() -> None:
    w, form = weight(), MatrixForm("q3", 64, 8)
    plain = store(w, MatrixForm("q3", 64))
    once = squared_error(w, plain, correction_of(w, plain, 8))
    assert once == pytest.approx(squared_error(w, *store_corrected(w, form, turns=0)))
    assert squared_error(w, *store_corrected(w, form)) < 0.95 * once


def test_a_matrix_that_its_format_holds_exactly_stays_exact() -> None:
    """Three levels per matrix are in NormalFloat's codebook; W's own directions would break it."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-1, 2, (64, 128), generator=generator).float()
    for rank in (0, 4):
        assert squared_error(w, *store_corrected(w, MatrixForm("nf4", 64, rank))) < 1e-6


def test_the_pair_is_the_best_of_its_rank_for_what_is_lost() -> None:
    w = weight()
    stored = store(w, MatrixForm("q4", 64))
    lost = w - stored.values(torch.float32)
    pair = correction_of(w, stored, 5)
    sigma = torch.linalg.svdvals(lost)
    assert squared_error(w, stored, pair) == pytest.approx(float((sigma[5:] ** 2).sum()), rel=1e-4)
    assert pair.a.shape == (5, 160)
    assert pair.b.shape == (96, 5)
    assert pair.bytes == 2 * 5 * (96 + 160)


def test_weights_move_the_error_to_where_it_counts_less() -> None:
    w = weight()
    rows, columns = torch.linspace(0.01, 4, 96), torch.linspace(4, 0.01, 160)
    form = MatrixForm("q2", 64, 8)
    weighted = store_corrected(w, form, rows, columns)
    plain = store_corrected(w, form)
    assert squared_error(w, *weighted, rows, columns) < 0.95 * squared_error(
        w, *plain, rows, columns
    )
    assert squared_error(w, *weighted) > squared_error(w, *plain)


def test_only_the_ratios_of_weights_matter() -> None:
    w, form = weight(), MatrixForm("q2", 64, 4)
    rows, columns = torch.linspace(0.1, 4, 96), torch.linspace(4, 0.1, 160)
    _, pair = store_corrected(w, form, rows, columns)
    _, scaled = store_corrected(w, form, 1e-9 * rows, 1e3 * columns)
    assert pair is not None
    assert scaled is not None
    torch.testing.assert_close(pair.product(), scaled.product(), rtol=1e-2, atol=1e-3)


def test_the_weighted_error_is_its_formula() -> None:
    w = weight(8, 64)
    rows, columns = torch.rand(8) + 0.1, torch.rand(64) + 0.1
    stored, pair = store_corrected(w, MatrixForm("q2", 64, 2))
    assert pair is not None
    left = (w - stored.values(torch.float32) - pair.b.float() @ pair.a.float()).double()
    by_hand = float((rows[:, None].double() * columns.double() * left**2).sum())
    assert squared_error(w, stored, pair, rows, columns) == pytest.approx(by_hand, rel=1e-5)


def test_a_row_without_weight_is_no_trouble() -> None:
    w = weight()
    rows = torch.ones(96)
    rows[:40] = 0.0
    _, pair = store_corrected(w, MatrixForm("q2", 64, 4), rows, torch.zeros(160))
    assert pair is not None
    assert bool(torch.isfinite(pair.product()).all())


def test_the_same_matrix_gives_the_same_pair() -> None:
    w = weight(600, 700)
    torch.manual_seed(1)
    first = store_corrected(w, MatrixForm("q3", 64, 4), turns=1)
    torch.manual_seed(2)
    second = store_corrected(w, MatrixForm("q3", 64, 4), turns=1)
    assert first[1] is not None
    assert second[1] is not None
    assert torch.equal(first[1].a, second[1].a)
    assert torch.equal(first[1].b, second[1].b)


def test_a_rank_above_the_matrix_is_its_shorter_side() -> None:
    _, pair = store_corrected(weight(8, 64), MatrixForm("q2", 64, 20))
    assert pair is not None
    assert pair.rank == 8


def test_a_matrix_of_zeros_has_a_pair_of_zeros() -> None:
    stored, pair = store_corrected(torch.zeros(16, 64), MatrixForm("q2", 64, 4))
    assert pair is not None
    assert squared_error(torch.zeros(16, 64), stored, pair) == 0.0


def test_the_randomised_directions_hold_nearly_what_the_exact_ones_do() -> None:
    """On noise, whose spectrum falls slowly, as that of a quantisation error does."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(700, 900, generator=generator)
    u, sigma, v = leading_directions(noise, 16)
    exact = torch.linalg.svdvals(noise)[:16]
    assert float((sigma**2).sum()) >= 0.93 * float((exact**2).sum())
    torch.testing.assert_close(u.t() @ noise @ v, torch.diag(sigma), rtol=1e-3, atol=1e-2)
