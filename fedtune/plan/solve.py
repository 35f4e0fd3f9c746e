"""Plan a fleet: for every device a backbone format, a micro-batch, and ranks that nest.

How long a round takes, and how ranks nest, is decided for the whole fleet (`fedtune.plan.fleet`).
Order of preference, per device, within that time:

1. the best format (`BACKBONE_FORMATS`) in which the granted ranks reach `ENOUGH_GAIN` of the gain
   that they could reach if memory did not count; if none does, the format that reaches most, the
   better on ties: no format is given up for more steps;
2. in that format, the most gain: coverage of the global rank order times share of the local steps,
   over ranks, depth of backpropagation, checkpointing and micro-batch;
3. among equal gains, the most rank, then the fastest;
4. of what memory is left, the frozen tail;
5. with a distortion table, better forms of single matrices where the format is one of few bits
   (`fedtune.plan.mixing`), or ranks and forms together by a mixed-integer program
   (`fedtune.plan.program`).

Samples are cut only on a device that can carry nothing otherwise, and only if the settings let it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedtune.errors import PlanError
from fedtune.plan.binding import binding
from fedtune.plan.cost import correction_rank, download_bytes, upload_bytes
from fedtune.plan.costs import Costs
from fedtune.plan.fleet import FleetChoice, Kind, Settled, choose_fleet
from fedtune.plan.ladder import Ladders, Rung, global_rungs, make_ladders
from fedtune.plan.limits import device_peak, load_of, tail_ranks
from fedtune.plan.mixing import check_table
from fedtune.plan.program import refine
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.task import Task
from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    DistortionTable,
    FleetPlan,
    ImportanceReport,
    MatrixPlan,
    ModelShapes,
)


def plan_fleet(
    profiles: Sequence[DeviceProfile],
    shapes: ModelShapes,
    settings: PlanSettings,
    importance: ImportanceReport | None = None,
    pins: Mapping[str, Pins] | None = None,
    distortion: DistortionTable | None = None,
    calibration: Mapping[str, CostCalibration] | None = None,
    samples: Mapping[str, int] | None = None,
) -> FleetPlan:
    """Choose for every device what it trains, on what backbone, in which micro-batches.

    The same input gives the same plan; the order of the profiles does not matter. Devices that
    differ in nothing but their names get equal plans, and are solved once.

    Args:
        importance: gains per rank; None takes a prior.
        pins: device class -> what the run file fixes for it.
        distortion: what each matrix loses in each form; None holds all matrices of a device alike.
        calibration: device class -> measured costs over predicted; a class without is as predicted.
        samples: device -> training samples, by which its gain counts; None: all alike.

    Raises:
        PlanError: a device cannot carry even the smallest plan, a pin contradicts the device or
            the settings, no matrix can be trained, or the distortion is of another base.
    """
    pins, calibration = pins or {}, calibration or {}
    if distortion is not None:
        check_table(distortion, shapes)
    rank_max = max([settings.rank_max, *(p.rank_max for p in pins.values())])
    rungs = global_rungs(shapes, settings, rank_max, importance)
    groups = _kinds_of(profiles)
    ladders: dict[tuple[int, int], Ladders] = {}
    kinds = []
    for group in groups:
        profile = group[0]
        fixed = pins.get(profile.device_class, Pins())
        _check_pins(profile, settings, fixed)
        limit = (fixed.rank, fixed.rank_max)
        if limit not in ladders:
            ladders[limit] = _ladders(shapes, settings, fixed, rungs)
        factors = calibration.get(profile.device_class, CostCalibration())
        task = Task(profile, shapes, settings, fixed, ladders[limit], distortion, factors)
        kinds.append(Kind(task, _weight(group, samples)))
    if not kinds:
        return FleetPlan(())
    costs = Costs(shapes)
    choice = choose_fleet(kinds, settings, costs)
    if settings.solver == "milp":
        choice = refine(kinds, choice, costs, settings.solver_seconds)
    plans = [
        replace(plan, device=profile.name)
        for group, plan in zip(groups, _kind_plans(kinds, choice), strict=True)
        for profile in group
    ]
    return FleetPlan(tuple(sorted(plans, key=lambda plan: plan.device)))


def _kinds_of(profiles: Sequence[DeviceProfile]) -> list[list[DeviceProfile]]:
    """Devices that differ in nothing but their names, in the order of names."""
    found: dict[tuple[object, ...], list[DeviceProfile]] = {}
    for profile in sorted(profiles, key=lambda profile: profile.name):
        found.setdefault(_key(profile), []).append(profile)
    return list(found.values())


def _weight(group: Sequence[DeviceProfile], samples: Mapping[str, int] | None) -> float:
    if samples is None:
        return float(len(group))
    return float(sum(max(1, samples.get(profile.name, 1)) for profile in group))


def _key(profile: DeviceProfile) -> tuple[object, ...]:
    """All of a profile that a plan depends on."""
    return (
        profile.device_class,
        profile.accelerator,
        profile.compute,
        profile.budget_bytes,
        tuple(sorted(profile.matmul_flops_per_s.items())),
        profile.memory_bandwidth_bytes_per_s,
        profile.link_bytes_per_s,
        profile.formats,
    )


def _ladders(
    shapes: ModelShapes, settings: PlanSettings, pins: Pins, rungs: tuple[Rung, ...]
) -> Ladders:
    """The rungs open to a device: within its rank limit, or exactly those of its pinned rank."""
    if pins.rank:
        return make_ladders(global_rungs(shapes, settings, pins.rank), shapes.layers, pins.rank)
    return make_ladders(rungs, shapes.layers, pins.rank_max or settings.rank_max)


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


def _kind_plans(kinds: Sequence[Kind], choice: FleetChoice) -> list[DevicePlan]:
    """The plan of each kind, for the first device of it."""
    pacer = kinds[choice.pacer()].task.profile
    return [
        _device_plan(kind.task, settled, binding(kind.task, settled, pacer))
        for kind, settled in zip(kinds, choice.settled, strict=True)
    ]


def _device_plan(task: Task, settled: Settled, words: str) -> DevicePlan:
    settings, choice, forms = task.settings, settled.choice, settled.forms
    load = load_of(task, choice.option, choice.length, choice.tail, forms)
    return DevicePlan(
        device=task.profile.name,
        matrices=_matrix_plans(task, settled),
        micro_batch=choice.option.micro_batch,
        batch_size=settings.batch_size,
        sequence_length=choice.option.sequence_length,
        local_steps=choice.steps,
        checkpointing=choice.option.checkpointing,
        first_trained_layer=load.first_trained_layer,
        peak_bytes=device_peak(task, forms, load),
        seconds=settled.seconds,
        download_bytes=download_bytes(load, settings.wire),
        upload_bytes=upload_bytes(load, settings.wire),
        binding=words,
    )


def _matrix_plans(task: Task, settled: Settled) -> tuple[MatrixPlan, ...]:
    choice, forms = settled.choice, settled.forms
    ranks = choice.ladder(task).ranks(choice.length)
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
