"""Plan a fleet: for every device a backbone format, a micro-batch, and ranks that nest.

Order of preference, per device:

1. the best format (`BACKBONE_FORMATS`) in which the granted ranks reach `ENOUGH_GAIN` of what
   the device's rank limit allows; if none does, the format that reaches most, the better on ties;
2. in that format, the most rank;
3. among equal ranks, no checkpointing, then the largest micro-batch: both change speed only;
4. of what memory is left, the frozen tail;
5. with a distortion table, of what is left then, better forms of single matrices where the format
   is one of few bits (`fedtune.plan.mixing`);
6. of the round's seconds, as many of the local steps as fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.errors import PlanError
from fedtune.plan.candidates import Choice, Task, best_choice, load_of, tail_ranks
from fedtune.plan.cost import (
    correction_rank,
    download_bytes,
    peak_bytes,
    step_seconds,
    transfer_seconds,
    upload_bytes,
)
from fedtune.plan.ladder import Ladder, Rung, global_rungs, make_ladder
from fedtune.plan.mixing import check_table, mixed_forms
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.shortfall import shortfall
from fedtune.records import (
    BACKBONE_FORMATS,
    DevicePlan,
    DeviceProfile,
    DistortionTable,
    FleetPlan,
    ImportanceReport,
    MatrixForm,
    MatrixPlan,
    ModelShapes,
)

ENOUGH_GAIN = 0.9
"""Share of the reachable gain below which a better format is given up for more rank. Chosen: with
the prior, nine tenths are 12 of 16 ranks, and the last ranks gain least."""


def plan_fleet(
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    importance: ImportanceReport | None = None,
    pins: Mapping[str, Pins] | None = None,
    distortion: DistortionTable | None = None,
) -> FleetPlan:
    """Choose for every device what it trains, on what backbone, in which micro-batches.

    The same input gives the same plan; the order of the profiles does not matter. Devices that
    differ in nothing but their names get equal plans.

    Args:
        importance: gains per rank; None takes a prior.
        pins: device class -> what the run file fixes for it.
        distortion: what each matrix loses in each form; None holds all matrices of a device alike.

    Raises:
        PlanError: a device cannot carry even the smallest plan, a pin contradicts the device or
            the settings, no matrix can be trained, or the distortion is of another base.
    """
    pins = pins or {}
    if distortion is not None:
        check_table(distortion, shapes)
    rank_max = max([settings.rank_max, *(p.rank_max for p in pins.values())])
    rungs = global_rungs(shapes, settings, rank_max, importance)
    solved: dict[tuple[object, ...], tuple[Task, Choice, Mapping[str, MatrixForm]]] = {}
    plans = []
    for profile in sorted(profiles, key=lambda profile: profile.name):
        device_pins = pins.get(profile.device_class, Pins())
        key = _key(profile)
        if key not in solved:
            _check_pins(profile, settings, device_pins)
            ladder = _ladder(shapes, settings, device_pins, rungs)
            task = Task(profile, shapes, settings, device_pins, ladder, distortion)
            choice = _choose(task)
            solved[key] = task, choice, mixed_forms(task, choice)
        plans.append(_device_plan(profile.name, *solved[key]))
    return FleetPlan(tuple(plans))


def _key(profile: DeviceProfile) -> tuple[object, ...]:
    """All of a profile that a plan depends on."""
    return (
        profile.device_class,
        profile.accelerator,
        profile.budget_bytes,
        tuple(sorted(profile.matmul_flops_per_s.items())),
        profile.memory_bandwidth_bytes_per_s,
        profile.link_bytes_per_s,
        profile.formats,
    )


def _ladder(
    shapes: ModelShapes, settings: PlanSettings, pins: Pins, rungs: tuple[Rung, ...]
) -> Ladder:
    """The rungs open to a device: within its rank limit, or exactly those of its pinned rank."""
    if pins.rank:
        return make_ladder(global_rungs(shapes, settings, pins.rank), shapes.layers, pins.rank)
    return make_ladder(rungs, shapes.layers, pins.rank_max or settings.rank_max)


def _check_pins(profile: DeviceProfile, settings: PlanSettings, pins: Pins) -> None:
    section = f"fleet.{profile.device_class}"
    if pins.format is not None and pins.format not in profile.formats:
        raise PlanError(
            f"{section}.format is pinned to {pins.format}, but device {profile.name} supports "
            f"{', '.join(profile.formats)}; pin one of these"
        )
    if pins.micro_batch and settings.batch_size % pins.micro_batch:
        raise PlanError(
            f"{section}.micro_batch must divide train.batch_size = {settings.batch_size}, "
            f"got {pins.micro_batch}"
        )


def _choose(task: Task) -> Choice:
    """The device's format, option, prefix and tail, in the order of preference above."""
    best: Choice | None = None
    for format_name in task.formats():
        choice = best_choice(task, format_name)
        if choice is None:
            continue
        if task.ladder.coverage(choice.length) >= ENOUGH_GAIN:
            return choice
        if best is None or choice.length > best.length:
            best = choice
    if best is None:
        raise shortfall(task)
    return best


def _device_plan(
    name: str, task: Task, choice: Choice, forms: Mapping[str, MatrixForm]
) -> DevicePlan:
    settings, option = task.settings, choice.option
    load = load_of(task, option, choice.length, choice.tail, forms)
    step = step_seconds(task.profile, task.shapes, forms, load, settings.batch_size)
    transfer = transfer_seconds(task.profile, load, settings.wire_itemsize)
    local_steps = _local_steps(settings, step, transfer)
    return DevicePlan(
        device=name,
        matrices=_matrix_plans(task, choice, forms),
        micro_batch=option.micro_batch,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        local_steps=local_steps,
        checkpointing=option.checkpointing,
        first_trained_layer=load.first_trained_layer,
        peak_bytes=peak_bytes(task.shapes, forms, load).total,
        seconds=local_steps * step + transfer,
        download_bytes=download_bytes(load, settings.wire_itemsize),
        upload_bytes=upload_bytes(load, settings.wire_itemsize),
        binding=_binding(task, choice, local_steps),
    )


def _matrix_plans(
    task: Task, choice: Choice, forms: Mapping[str, MatrixForm]
) -> tuple[MatrixPlan, ...]:
    ranks = task.ladder.ranks(choice.length)
    tails = tail_ranks(task, ranks, choice.tail)
    return tuple(
        MatrixPlan(
            name=matrix.name,
            rank=ranks.get(matrix.name, 0),
            format=forms[matrix.name].format,
            tail_rank=tails.get(matrix.name, 0),
            block_size=forms[matrix.name].block_size,
            correction_rank=correction_rank(matrix, forms[matrix.name]),
        )
        for matrix in task.shapes.matrices
    )


def _local_steps(settings: PlanSettings, step: float, transfer: float) -> int:
    """As many of the run's local steps as fit the round after both transfers."""
    if settings.round_seconds <= 0 or step <= 0:
        return settings.local_steps
    fitting = int((settings.round_seconds - transfer) / step)
    return max(1, min(settings.local_steps, fitting))


def _binding(task: Task, choice: Choice, local_steps: int) -> str:
    """What decided the plan, in words: what stopped the ranks, then every further limit."""
    pins, settings = task.pins, task.settings
    words = [f"pinned rank {pins.rank}" if pins.rank else choice.stopped_by or "rank-max"]
    if pins.format is not None:
        words.append(f"pinned format {pins.format}")
    if pins.micro_batch:
        words.append(f"pinned micro-batch {pins.micro_batch}")
    best_format = next(name for name in BACKBONE_FORMATS if name in task.profile.formats)
    if pins.format is None and choice.option.format != best_format and words[0] != "memory":
        words.append(f"memory ({choice.option.format} for {best_format})")
    if local_steps < settings.local_steps:
        words.append(f"round time ({local_steps} of {settings.local_steps} steps)")
    return ", ".join(words)
