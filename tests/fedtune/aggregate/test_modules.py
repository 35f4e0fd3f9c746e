from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from fedtune.aggregate import contributions
from fedtune.aggregate.contributions import Share
from fedtune.aggregate.low_rank import empty
from fedtune.aggregate.modules import for_each
from fedtune.records import Dispatch, GlobalAdapter, LoraFactors


def blas_threads() -> set[int]:
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


@pytest.mark.parametrize("workers", [1, 2, 5, None])
def test_results_come_in_the_order_of_the_items(workers: int | None) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 / (item + 1))
        return item**2

    assert for_each(range(6), slow_first, workers) == [0, 1, 4, 9, 16, 25]


def test_so_many_items_are_worked_on_at_a_time() -> None:
    met = threading.Barrier(3, timeout=20)
    for_each(range(3), lambda _: met.wait(), 3)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_has_one_thread_of_the_library_and_the_caller_its_own_again(
    workers: int,
) -> None:
    with threadpool_limits(limits=2, user_api="blas"):
        assert for_each(range(3), lambda _: blas_threads(), workers) == [{1}] * 3
        assert blas_threads() == {2}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_told_and_the_rest_is_left(workers: int) -> None:
    begun = []

    def fails(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise ValueError("item one")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="item one"):
        for_each(range(200), fails, workers)
    assert len(begun) < 200


def test_no_item_is_no_work() -> None:
    assert for_each([], np.sum, 4) == []


@pytest.mark.parametrize(
    ("most_bytes", "workers"), [(10**9, 8), (5 * 4 * 40, 5), (4 * 40, 1), (1, 1)]
)
def test_as_many_matrices_at_a_time_as_their_factors_leave_memory(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, workers: int
) -> None:
    """Two devices of rank 2 on a (6, 4) matrix return 40 numbers of it; b of 16 is smaller."""
    monkeypatch.setattr(contributions, "usable_cores", lambda: 8)
    monkeypatch.setattr(contributions, "_AT_ONCE_BYTES", most_bytes)
    large = LoraFactors(np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32))
    small = LoraFactors(np.zeros((2, 4), np.float32), np.zeros((4, 2), np.float32))
    sent = Dispatch({"a": large, "b": small}), Dispatch({"a": large})
    shares = [Share(str(i), 0.5, each, {}, {}) for i, each in enumerate(sent)]
    adapter = GlobalAdapter(0, {"a": empty(6, 4), "b": empty(4, 4)})
    assert contributions.bounded_workers(adapter, shares) == workers
