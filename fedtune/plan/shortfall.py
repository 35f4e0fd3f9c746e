"""The error of a device that cannot carry even the smallest plan, with what would help it."""

from __future__ import annotations

from fedtune.errors import PlanError
from fedtune.plan.candidates import (
    Option,
    Task,
    load_of,
    options,
    refusal,
    shortest,
    smallest_tail,
)
from fedtune.plan.cost import (
    Load,
    PeakBytes,
    peak_bytes,
    step_seconds,
    transfer_seconds,
    upload_bytes,
)
from fedtune.records import BLOCK_BITS

_PARTS = {
    "backbone": ("backbone takes", "a smaller base model"),
    "correction": ("correction pairs take", "a lower correction_rank"),
    "other": ("embeddings and norms take", "a smaller base model"),
    "adapter": ("adapter takes", "a lower rank"),
    "optimiser": ("adapter takes in gradients and optimiser state", "a lower rank"),
    "activations": ("activations take", "a lower data.max_tokens"),
    "transient": ("logits and block gradients take", "a lower data.max_tokens"),
    "workspace": ("unpacked matrix takes", "a base model whose largest matrix is smaller"),
}
"""Part of the peak -> how a sentence names it, and what would lower it."""


def shortfall(task: Task) -> PlanError:
    """Say what the smallest plan of a device needs, what takes most of it, what would free it."""
    name = task.profile.name
    smallest = min(
        (option for format_name in task.formats() for option in options(task, format_name)),
        key=lambda option: _peak(task, option).total,
    )
    peak, budget = _peak(task, smallest), task.profile.budget_bytes
    if peak.total <= budget:
        sent = upload_bytes(_load(task, smallest), task.settings.wire_itemsize)
        if 0 < task.pins.upload_bytes < sent:
            return _too_narrow(task, sent)
        return _too_slow(task)
    part, size = peak.largest()
    takes, remedy = _PARTS[part]
    return PlanError(
        f"device {name} has a memory budget of {human_bytes(budget)}, and the smallest plan needs "
        f"{human_bytes(peak.total)} ({_words(task, smallest)}); its {takes} "
        f"{human_bytes(size)}; give it a memory of "
        f"at least {human_bytes(peak.total)} in fleet.{task.profile.device_class}"
        f"{''.join(', or ' + way for way in _ways(task, remedy))}"
    )


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
    return PlanError(
        f"device {task.profile.name} may send {human_bytes(task.pins.upload_bytes)} a round, and "
        f"the smallest update takes {human_bytes(sent)}; raise {section}.upload{pinned}"
    )


def _too_slow(task: Task) -> PlanError:
    """The device has the memory, but no plan that fits it meets the round's seconds."""
    settings, profile = task.settings, task.profile
    fitting = [
        option
        for format_name in task.formats()
        for option in options(task, format_name)
        if refusal(task, option, shortest(task), smallest_tail(task)) != "memory"
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
    load, forms = _load(task, option), option.forms(task.shapes)
    step = step_seconds(task.profile, task.shapes, forms, load, task.settings.batch_size)
    return step, transfer_seconds(task.profile, load, task.settings.wire_itemsize)


def _load(task: Task, option: Option) -> Load:
    return load_of(task, option, shortest(task), smallest_tail(task))


def _peak(task: Task, option: Option) -> PeakBytes:
    return peak_bytes(task.shapes, option.forms(task.shapes), _load(task, option))


def _words(task: Task, option: Option) -> str:
    rank = f"rank {task.pins.rank} pinned" if task.pins.rank else "rank 1 of one matrix"
    checkpointing = ", checkpointing" if option.checkpointing else ""
    return f"{option.format} backbone, micro-batch {option.micro_batch}{checkpointing}, {rank}"


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
    return [*ways, f"choose {remedy}"]
