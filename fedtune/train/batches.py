"""Which samples a device trains on, step by step: a seeded stream without gaps or memory.

The stream of a device is a sequence of shuffled passes over its samples. A round reads the next
`batch_size * local_steps` of it, and where it stands follows from the round's number alone, so a
device that restarts, or a run that resumes, reads on where it would have been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedtune.model.loss import TokenisedSample


def stream(count: int, seed: Sequence[int], start: int, length: int) -> list[int]:
    """Sample indices `start` .. `start + length` of the endless shuffled stream over `count`.

    Args:
        seed: run seed and whatever tells this device's stream from others.
    """
    chosen: list[int] = []
    while len(chosen) < length:
        epoch, offset = divmod(start + len(chosen), count)
        order = np.random.default_rng([*seed, epoch]).permutation(count)
        chosen.extend(int(i) for i in order[offset : offset + length - len(chosen)])
    return chosen


def micro_batches(
    batch: Sequence[TokenisedSample], size: int
) -> Iterator[Sequence[TokenisedSample]]:
    """Cut one optimiser step's samples into forward passes of like lengths, longest first.

    Sorting by length wastes the least padding; longest first shows a memory shortage at once.
    """
    ordered = sorted(batch, key=lambda sample: len(sample.tokens), reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
