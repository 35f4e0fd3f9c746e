"""What decided a device's plan, in words."""

from __future__ import annotations

from fedtune.plan.fleet import Settled
from fedtune.plan.settle import MAKESPAN
from fedtune.plan.task import Task
from fedtune.records import BACKBONE_FORMATS, DeviceProfile


def binding(task: Task, settled: Settled, pacer: DeviceProfile) -> str:
    """What stopped the ranks, then every further limit.

    Args:
        pacer: the device whose round is the longest of the fleet.
    """
    pins, settings, choice = task.pins, task.settings, settled.choice
    stopped = choice.stopped_by or "rank-max"
    words = [f"pinned rank {pins.rank}" if pins.rank else stopped]
    if choice.steps < settings.local_steps and words == [MAKESPAN]:
        words = []  # said with the steps
    if pins.format is not None:
        words.append(f"pinned format {pins.format}")
    if pins.micro_batch:
        words.append(f"pinned micro-batch {pins.micro_batch}")
    best_format = next(name for name in BACKBONE_FORMATS if name in task.profile.formats)
    if pins.format is None and choice.option.format != best_format and stopped != "memory":
        words.append(f"memory ({choice.option.format} for {best_format})")
    if choice.option.depth > task.depths()[0]:
        words.append(f"depth (layers from {choice.option.depth} up)")
    if choice.option.sequence_length < settings.sequence_length:
        cut, whole = choice.option.sequence_length, settings.sequence_length
        words.append(f"memory (samples cut to {cut} of {whole} tokens)")
    if choice.steps < settings.local_steps:
        words.append(_fewer_steps(task, choice.steps, settled.seconds, pacer))
    elif stopped == MAKESPAN:
        words.append(f"paced by {pacer.device_class}")
    if settled.unfinished:
        words.append("solver limit")
    return ", ".join(words)


def _fewer_steps(task: Task, steps: int, seconds: float, pacer: DeviceProfile) -> str:
    of = f"{steps} of {task.settings.local_steps} steps"
    limit = task.settings.round_seconds
    step = seconds / steps
    if limit and seconds + step > limit:
        return f"round time ({of})"
    paced = (
        ""
        if pacer.device_class == task.profile.device_class
        else (f", paced by {pacer.device_class}")
    )
    return f"makespan ({of}{paced})"
