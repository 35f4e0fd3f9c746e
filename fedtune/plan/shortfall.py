"""The error of a device that cannot carry even the smallest plan, with what would help it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from fedtune.errors import PlanError
from fedtune.plan.cost import Load, PeakBytes, peak_bytes, upload_bytes
from fedtune.plan.limits import device_step, device_transfer, load_of, refusal
from fedtune.plan.task import Option, Task, options, shortest, smallest_tail
from fedtune.records import BLOCK_BITS

_FEWER_TOKENS = "a lower data.max_tokens"
_PARTS = {
    "backbone": ("backbone takes", "a smaller base model"),
    "correction": ("correction pairs take", "a lower correction_rank"),
    "other": ("embeddings and norms take", "a smaller base model"),
    "adapter": ("adapter takes", "a lower rank"),
    "optimiser": ("adapter takes in gradients and optimiser state", "a lower rank"),
    "activations": ("activations take", _FEWER_TOKENS),
    "transient": ("logits and block gradients take", _FEWER_TOKENS),
    "workspace": ("unpacked matrix takes", "a base model whose largest matrix is smaller"),
}
"""Part of the peak -> how a sentence names it, and what would lower it."""


def shortfall(task: Task) -> PlanError:
    """Say what the smallest plan of a device needs, what takes most of it, what would free it."""
    name = task.profile.name
    smallest = min(_smallest_options(task), key=lambda option: _needed(task, option))
    needed, budget = _needed(task, smallest), task.profile.budget_bytes
    if needed <= budget:
        sent = upload_bytes(_load(task, smallest), task.settings.wire)
        if 0 < task.upload_limit < sent:
            return _too_narrow(task, sent)
        return _too_slow(task)
    part, size = _peak(task, smallest).largest()
    takes, remedy = _PARTS[part]
    if remedy == _FEWER_TOKENS:
        remedy += _enough_tokens(task, smallest)
    return PlanError(
        f"device {name} has a memory budget of {human_bytes(budget)}, and the smallest plan needs "
        f"{human_bytes(needed)} ({_words(task, smallest)}); its {takes} {human_bytes(size)}; "
        f"{human_bytes(needed - budget)} are missing: give it a memory of at least "
        f"{human_bytes(needed)} in fleet.{task.profile.device_class}"
        f"{''.join(', or ' + way for way in _ways(task, remedy))}"
    )


def can_fit(task: Task) -> bool:
    """Whether the memory of a device is enough for its smallest plan."""
    return any(_needed(task, each) <= task.profile.budget_bytes for each in _smallest_options(task))


def _smallest_options(task: Task) -> Iterator[Option]:
    """The ways of least memory: samples as short as may be, trained as high up as may be."""
    for name in task.formats():
        yield from options(task, name, task.sequence_lengths()[-1], task.depths()[-1])


def _enough_tokens(task: Task, smallest: Option) -> str:
    """The most tokens at which the smallest plan would fit, in brackets; empty if none would."""
    fitting, over = 0, smallest.sequence_length
    while over - fitting > 1:
        middle = (fitting + over) // 2
        if _needed(task, replace(smallest, sequence_length=middle)) <= task.profile.budget_bytes:
            fitting = middle
        else:
            over = middle
    return f" ({fitting} would do)" if fitting else ""


def human_bytes(count: int) -> str:
    """Bytes in the decimal unit that reads best, rounded up: `1.7 MB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            tenths = -(-count * 10 // size)
            return f"{tenths / 10:g} {unit}"
    return f"{count} B"


def _too_narrow(task: Task, sent: int) -> PlanError:
    """The smallest update is larger than what the device may send."""
    section = f"fleet.{task.profile.device_class}"
    pinned = f", or unpin {section}.rank" if task.pins.rank else ""
    own = task.upload_limit == task.pins.upload_bytes
    key = f"{section}.upload" if own else "plan.max_bytes"
    return PlanError(
        f"device {task.profile.name} may send {human_bytes(task.upload_limit)} a round, and "
        f"the smallest update takes {human_bytes(sent)}; raise {key}{pinned}"
    )


def _too_slow(task: Task) -> PlanError:
    """The device has the memory, but no plan that fits it meets the round's seconds."""
    settings, profile = task.settings, task.profile
    fitting = [
        option
        for option in _smallest_options(task)
        if refusal(task, option, shortest(task, option.depth), smallest_tail(task)) != "memory"
    ]
    seconds = {option: _seconds(task, option) for option in fitting}
    fastest = min(fitting, key=lambda option: sum(seconds[option]))
    step, transfer = seconds[fastest]
    return PlanError(
        f"device {profile.name} cannot finish a round in plan.round_seconds = "
        f"{settings.round_seconds:g}: its fastest plan ({_words(task, fastest)}) needs "
        f"{step:.3g} s for one step and {transfer:.3g} s for both transfers, which may take a "
        "quarter of the round; raise plan.round_seconds, or leave the device out"
    )


def _seconds(task: Task, option: Option) -> tuple[float, float]:
    load = _load(task, option)
    return device_step(task, option.forms(task.shapes), load), device_transfer(task, load)


def _load(task: Task, option: Option) -> Load:
    return load_of(task, option, shortest(task, option.depth), smallest_tail(task))


def _peak(task: Task, option: Option) -> PeakBytes:
    return peak_bytes(task.shapes, option.forms(task.shapes), _load(task, option))


def _needed(task: Task, option: Option) -> int:
    return math.ceil(_peak(task, option).total * task.calibration.bytes_factor)


def _words(task: Task, option: Option) -> str:
    rank = f"rank {task.pins.rank} pinned" if task.pins.rank else "rank 1 of one matrix"
    checkpointing = ", checkpointing" if option.checkpointing else ""
    whole = option.sequence_length == task.settings.sequence_length
    cut = "" if whole else f", samples of {option.sequence_length} tokens"
    return f"{option.format} backbone, micro-batch {option.micro_batch}{checkpointing}{cut}, {rank}"


def _ways(task: Task, remedy: str) -> list[str]:
    """What would make a smaller plan, the most specific first."""
    pins, section = task.pins, f"fleet.{task.profile.device_class}"
    ways = [
        f"unpin {section}.{key}"
        for key, pinned in (
            ("rank", pins.rank > 0),
            ("format", pins.format is not None),
            ("micro_batch", pins.micro_batch > 1),
        )
        if pinned
    ]
    if not task.settings.checkpointing:
        ways.append("allow plan.checkpointing")
    if all(BLOCK_BITS.get(name, 8) > 4 for name in task.profile.formats):
        ways.append(f"add q4 to {section}.formats")
    ways.append(f"choose {remedy}")
    if not task.settings.shortest_sequence:
        ways.append("let samples be cut by plan.shortest_sequence")
    return ways
