"""Updates are added up as they come, in memory that does not grow with their number."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from fedtune.aggregate.folding import Columns, add_up, columns_of_factors, columns_of_low_rank
from fedtune.aggregate.low_rank import reduce_sum
from fedtune.aggregate.stack import Dense, Stack, stack_of
from fedtune.records import LoraFactors, LowRank


def state(out_features: int, in_features: int, rank: int = 6) -> LowRank:
    rng = np.random.default_rng(0)
    left, right = (
        rng.standard_normal((out_features, rank)),
        rng.standard_normal((in_features, rank)),
    )
    return reduce_sum(stack_of(left, right), rank)[0]


def updates(count: int, out_features: int, in_features: int, rank: int = 5) -> Iterator[Columns]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        a = rng.standard_normal((rank, in_features), np.float32)
        b = rng.standard_normal((out_features, rank), np.float32)
        yield columns_of_factors(LoraFactors(a, b, 0.5), 0.1)


def product(columns: Columns) -> np.ndarray:
    left, right = columns.left.astype(np.float64), columns.right.astype(np.float64)
    return (left * columns.weights) @ right.T


@pytest.mark.parametrize(("count", "form"), [(3, Stack), (200, Dense)])
def test_the_sum_is_that_of_all_products(count: int, form: type[Stack] | type[Dense]) -> None:
    shape = (70, 50)
    before = columns_of_low_rank(state(*shape), np.linspace(0.0, 1.0, 6))
    total = add_up(before, updates(count, *shape), 5 * count)
    assert isinstance(total, form)
    expected = product(before) + sum(product(each) for each in updates(count, *shape))
    assert np.abs(total.dense() - expected).max() < 1e-12 * np.abs(expected).max()


def test_a_part_that_is_wider_than_the_buffer_is_taken_in_pieces() -> None:
    shape = (40, 30)
    before = columns_of_low_rank(state(*shape), np.ones(6))
    parts = list(updates(2, *shape, rank=700))
    total = add_up(before, parts, 1400)
    assert isinstance(total, Dense)
    expected = product(before) + product(parts[0]) + product(parts[1])
    assert np.abs(total.dense() - expected).max() < 1e-12 * np.abs(expected).max()


def test_the_directions_of_the_state_are_not_copied() -> None:
    before = state(70, 50)
    total = add_up(columns_of_low_rank(before, np.ones(6)), updates(2, 70, 50), 10)
    assert isinstance(total, Stack)
    assert np.shares_memory(total.left.pieces[0], before.u)
    assert np.shares_memory(total.right.pieces[0], before.v)


def test_leading_directions_of_no_share_are_left_out() -> None:
    before = state(70, 50)
    assert columns_of_low_rank(before, np.float64([0, 0, 0.5, 1, 1, 1])).left.shape == (70, 4)
    assert columns_of_low_rank(before, np.zeros(6)).left.shape == (70, 0)
    total = add_up(columns_of_low_rank(before, np.zeros(6)), updates(2, 70, 50), 10)
    assert total.columns == 10


def test_a_thousand_devices_take_the_memory_of_a_hundred() -> None:
    shape = (256, 192)
    dense_bytes = 8 * 256 * 192

    def peak(count: int) -> int:
        before = columns_of_low_rank(state(*shape), np.ones(6))
        tracemalloc.start()
        reduce_sum(add_up(before, updates(count, *shape), 5 * count), 16)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)
    hundred, thousand = peak(100), peak(1000)
    assert thousand < 1.05 * hundred
    assert thousand < 12 * dense_bytes  # the factors of a thousand are 23 times that
