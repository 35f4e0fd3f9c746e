"""Work on the matrices of a model, several at a time, with one thread each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from fedtune.devices.processor import usable_cores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def for_each(
    items: Iterable[_Item], work: Callable[[_Item], _Result], workers: int | None = None
) -> list[_Result]:
    """Results of `work`, in the order of the items.

    Every item is worked on by one thread, because the linear algebra library rounds differently by
    the number of its threads: the results are the same bits for any number of workers. Matrices of
    LoRA factors are small, so this is also faster than all threads on one matrix.

    Args:
        workers: items at the same time, each with its own memory; None: the usable cores.

    Raises:
        Whatever `work` raises, for the first item that fails; items that follow may be left out.
    """
    items = list(items)
    count = min(usable_cores() if workers is None else workers, len(items))
    with threadpool_limits(limits=1, user_api="blas"):
        if count <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(count, thread_name_prefix="join") as pool:
            return list(pool.map(work, items))
