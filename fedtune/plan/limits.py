"""What a device may not exceed, checked exactly: memory, update size, and a round's seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from fedtune.plan.cost import (
    Load,
    correction_elements,
    peak_bytes,
    step_seconds,
    transfer_seconds,
    upload_bytes,
)
from fedtune.plan.task import Choice, Option, Task
from fedtune.records import MatrixForm

TRANSFER_SHARE = 0.25
"""Share of `round_seconds` that both transfers may take. Chosen: steps teach the model, transfers
do not, and a message four times as long buys little more rank than one."""

NEARLY = 1e-9
"""Relative difference below which two numbers of seconds or gains count as equal."""


def bare_load(task: Task, option: Option) -> Load:
    """What the device computes before any rank is granted or matrix repaired."""
    return Load(
        micro_batch=option.micro_batch,
        sequence_length=option.sequence_length,
        checkpointing=option.checkpointing,
        first_trained_layer=option.depth,
        dense_parameters=task.settings.dense_parameters,
        task=task.settings.task,
        eager_attention=task.settings.eager_attention,
        whole_matrices=task.whole_matrices,
        itemsize=task.itemsize,
        keeps_start=task.settings.keeps_start,
    )


def load_of(
    task: Task,
    option: Option,
    length: int,
    tail: int = 0,
    forms: Mapping[str, MatrixForm] | None = None,
) -> Load:
    """What the device computes with the first `length` rungs above its depth, and a tail.

    Args:
        forms: of each matrix; None takes the option's.
    """
    ladder = task.ladders.above(option.depth)
    tail_ranks, tail_elements = _tail_sums(task, option, length, tail)
    forms = option.forms(task.shapes) if forms is None else forms
    return replace(
        bare_load(task, option),
        first_trained_layer=ladder.first_layer[length],
        trained_elements=ladder.elements[length],
        trained_ranks=length,
        tail_elements=tail_elements,
        tail_ranks=tail_ranks,
        correction_elements=sum(
            correction_elements(matrix, forms[matrix.name])
            for matrix in task.shapes.matrices
            if forms[matrix.name].correction_rank
        ),
    )


def device_peak(task: Task, forms: Mapping[str, MatrixForm], load: Load) -> int:
    """Predicted peak in bytes, by what was measured of the device's class."""
    total = peak_bytes(task.shapes, forms, load).total
    return math.ceil(total * task.calibration.bytes_factor)


def device_step(task: Task, forms: Mapping[str, MatrixForm], load: Load) -> float:
    """Predicted seconds of an optimiser step, by what was measured of the device's class."""
    measured = task.calibration
    seconds = step_seconds(
        task.profile,
        task.shapes,
        forms,
        load,
        task.settings.batch_size,
        block_seconds=measured.block_seconds,
    )
    return seconds * measured.seconds_factor


def device_transfer(task: Task, load: Load) -> float:
    """Predicted seconds of both transfers."""
    return transfer_seconds(task.profile, load, task.settings.wire)


def round_seconds(task: Task, choice: Choice, forms: Mapping[str, MatrixForm]) -> float:
    """Predicted seconds of a round: both transfers and the choice's steps."""
    load = load_of(task, choice.option, choice.length, choice.tail, forms)
    return choice.steps * device_step(task, forms, load) + device_transfer(task, load)


def tail_ranks(task: Task, ranks: Mapping[str, int], tail: int) -> dict[str, int]:
    """Tail of each matrix that may be trained: at most `tail`, the cap's rest, the matrix's rest.

    The global adapter has no directions in other matrices, so they get none.
    """
    trainable = set(task.settings.trainable)
    found: dict[str, int] = {}
    for matrix in task.shapes.matrices:
        if trainable and matrix.name not in trainable:
            continue
        most = min(task.settings.rank_cap, matrix.out_features, matrix.in_features)
        trained = 0 if task.settings.whole_tail else ranks.get(matrix.name, 0)
        found[matrix.name] = max(0, min(tail, most - trained))
    return found


def refusal(
    task: Task,
    option: Option,
    length: int,
    tail: int = 0,
    forms: Mapping[str, MatrixForm] | None = None,
) -> str:
    """Which limit refuses the first `length` rungs with a tail; empty if none does.

    Args:
        forms: of each matrix; None takes the option's.
    """
    settings = task.settings
    forms = option.forms(task.shapes) if forms is None else forms
    load = load_of(task, option, length, tail, forms)
    if device_peak(task, forms, load) > task.profile.budget_bytes:
        return "memory"
    most = task.upload_limit
    if most and upload_bytes(load, settings.wire) > most:
        return "upload size"
    if settings.round_seconds > 0:
        transfer = device_transfer(task, load)
        if transfer > TRANSFER_SHARE * settings.round_seconds:
            return "upload time"
        if transfer + device_step(task, forms, load) > settings.round_seconds:
            return "round time"
    return ""


def longest(first: int, last: int, fits: Callable[[int], bool], guess: int = -1) -> int | None:
    """The largest number in first..last that fits, if fitting never returns once it is lost.

    Args:
        guess: where to look first; few calls are needed if it is near.
    """
    if not fits(first):
        return None
    low, high = first, last  # low fits
    if first < guess <= last:
        low, high = _bracket(first, last, guess, fits)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _bracket(first: int, last: int, guess: int, fits: Callable[[int], bool]) -> tuple[int, int]:
    """A number that fits, and one that nothing above fits, by steps that double from a guess."""
    step = 1
    if fits(guess):
        low = guess
        while low < last and fits(min(low + step, last)):
            low, step = min(low + step, last), 2 * step
        return low, min(low + step, last) - (1 if low < last else 0)
    high = guess - 1
    while high > first and not fits(max(high - step, first)):
        high, step = max(high - step, first) - 1, 2 * step
    return max(high - step, first), max(high, first)


def _tail_sums(task: Task, option: Option, length: int, tail: int) -> tuple[int, int]:
    """Sum of tail ranks, and of their elements, over the matrices."""
    if tail == 0:
        return 0, 0
    by_name = task.shapes.by_name()
    ranks = tail_ranks(task, task.ladders.above(option.depth).ranks(length), tail)
    elements = (n * (by_name[k].out_features + by_name[k].in_features) for k, n in ranks.items())
    return sum(ranks.values()), sum(elements)
