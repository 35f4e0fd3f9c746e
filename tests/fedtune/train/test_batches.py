"""The stream of samples of a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtune.train.batches import micro_batches, stream


@dataclass(frozen=True)
class _Sample:
    tokens: np.ndarray
    loss_mask: np.ndarray
    label: int = -1


def _sample(length: int) -> _Sample:
    return _Sample(np.zeros(length, np.int32), np.ones(length, np.bool_))


def test_every_pass_takes_every_sample_once() -> None:
    taken = stream(7, [0, 1], 0, 21)
    for start in (0, 7, 14):
        assert sorted(taken[start : start + 7]) == list(range(7))
    assert taken[:7] != taken[7:14]


def test_rounds_read_on_where_the_last_one_stopped() -> None:
    whole = stream(10, [3], 0, 40)
    parts = [stream(10, [3], start, 8) for start in range(0, 40, 8)]
    assert [index for part in parts for index in part] == whole


def test_the_stream_depends_on_the_seed() -> None:
    assert stream(50, [1], 0, 50) != stream(50, [2], 0, 50)
    assert stream(50, [1], 0, 50) == stream(50, [1], 0, 50)


def test_one_sample_is_enough_for_any_length() -> None:
    assert stream(1, [0], 5, 4) == [0, 0, 0, 0]


def test_micro_batches_hold_every_sample_once_longest_first() -> None:
    batch = [_sample(length) for length in (3, 9, 1, 7, 5)]
    parts = list(micro_batches(batch, 2))
    assert [[len(s.tokens) for s in part] for part in parts] == [[9, 7], [5, 3], [1]]
