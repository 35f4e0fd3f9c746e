"""From the best candidate of a device to a choice that is exact: rungs, tail, steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from fedtune.plan.candidates import Caps, Pick, most_steps
from fedtune.plan.limits import (
    NEARLY,
    TRANSFER_SHARE,
    device_step,
    device_transfer,
    load_of,
    longest,
    refusal,
)
from fedtune.plan.task import Choice, Option, Task, options, shortest, smallest_tail

MAKESPAN = "makespan"
"""What stops the ranks of a device that gives some up for a shorter round."""
NESTING = "nesting"
"""What stops those that a stronger device does not have."""


def settle(task: Task, pick: Pick, seconds: float, caps: Caps | None) -> Choice | None:
    """The pick with as many rungs, tail and steps as its limits allow by the exact cost model.

    Args:
        seconds: longest round.

    Returns:
        None where the exact model refuses what the straight lines allowed.
    """
    option, least_tail = pick.option, smallest_tail(task)
    capped = _capped(task, option, caps)
    last = capped if pick.longest else pick.length
    length = longest(
        shortest(task, option.depth),
        last,
        lambda number: not refusal(task, option, number, least_tail),
        pick.length,
    )
    if length is None:
        return None
    tail = _tail(task, pick, length, seconds)
    steps = _steps(task, option, length, tail, seconds)
    if not steps:
        return None
    choice = Choice(option, length, tail, steps, "")
    return replace(choice, stopped_by=_stopped_by(task, choice, capped))


def search(task: Task, seconds: float) -> Choice | None:
    """The choice of most coverage by the exact model alone; slow, for what the lines missed."""
    best: Choice | None = None
    for option in _all_options(task):
        pick = Pick(option, shortest(task, option.depth), 1, 0.0, 0.0, 0.0, 0.0, True)
        choice = settle(task, pick, seconds, None)
        if choice and (best is None or choice.coverage(task) > best.coverage(task)):
            best = choice
    return best


def _all_options(task: Task) -> Iterator[Option]:
    """Every way to compute; shorter samples only come after all ways with longer ones."""
    for sequence_length in task.sequence_lengths():
        for name in task.formats():
            for depth in task.depths():
                yield from options(task, name, sequence_length, depth)


def _capped(task: Task, option: Option, caps: Caps | None) -> int:
    """Most rungs that the caps leave of the option's ladder."""
    ladder = task.ladders.above(option.depth)
    if caps is None:
        return len(ladder)
    return min(bisect_left(ladder.positions, caps.end), len(ladder))


def _tail(task: Task, pick: Pick, length: int, seconds: float) -> int:
    """The longest tail that costs neither a limit nor a step, or no more than its share of time."""
    option, least, most = pick.option, smallest_tail(task), task.settings.tail_max
    bare = load_of(task, option, length)
    forms = option.forms(task.shapes)
    wanted = task.settings.local_steps
    step, transfer = device_step(task, forms, bare), device_transfer(task, bare)
    room = max(seconds - transfer - wanted * step, TRANSFER_SHARE * seconds)

    def allowed(tail: int) -> bool:
        if refusal(task, option, length, tail):
            return False
        if tail == least or np.isinf(seconds):
            return True
        load = load_of(task, option, length, tail)
        more = device_transfer(task, load) - transfer
        return more + wanted * (device_step(task, forms, load) - step) <= room * (1 + NEARLY)

    return longest(least, most, allowed, int(pick.tail * most)) or 0


def _steps(task: Task, option: Option, length: int, tail: int, seconds: float) -> int:
    forms = option.forms(task.shapes)
    load = load_of(task, option, length, tail)
    return most_steps(task, seconds, device_step(task, forms, load), device_transfer(task, load))


def _stopped_by(task: Task, choice: Choice, capped: int) -> str:
    """What refused the next rung, or those of the layers below."""
    option, length = choice.option, choice.length
    ladder = choice.ladder(task)
    refuses = partial(refusal, task, tail=smallest_tail(task))
    if length < len(ladder):
        if length == capped:
            return NESTING
        return refuses(option, length + 1) or MAKESPAN
    lowest = replace(option, depth=task.depths()[0])
    whole = len(task.ladders.above(lowest.depth))
    if whole == length:
        return ""
    return refuses(lowest, whole) or MAKESPAN
