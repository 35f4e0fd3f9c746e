"""What a device measures before the fleet is planned: what matters in its data, what a step costs.

Both are measured on the backbone, and with the micro-batch, of a first plan that fits the device.
The sums that importance is read from take a backward pass down to the lowest block, whatever the
plan trains; where the plan stops above it, blocks are recomputed, so that memory stays the plan's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from fedtune.data.samples import Sample
from fedtune.devices.usage import peak_resident_bytes, restart_peak
from fedtune.errors import ProtocolError
from fedtune.importance.collect import Collector, collecting
from fedtune.model.backbone import Backbone
from fedtune.model.loss import Batch, TokenisedSample, loss_sum, loss_units, prepare
from fedtune.records import DevicePlan, Dispatch, FloatArray, LoraFactors, TaskName
from fedtune.train.batches import micro_batches
from fedtune.train.compute import LossScale
from fedtune.train.round import mount, set_checkpointing, train_round, unmount
from fedtune.wire.calibration import CalibrationInstruction, CalibrationReport
from fedtune.wire.messages import OptimizerSpec
from fedtune.wire.packing import pack_tensors, tensors_digest

_TIMED_STEPS: Final = 3
"""Steps that are timed after a first one that is not; the fastest counts. Chosen: what disturbs a
step only ever makes it longer."""
_LOWER: Final = (1.0, 2.0**-4, 2.0**-8, 2.0**-12)
"""Shares of the loss scale to try, until float16 gradients are finite."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What a device measures on.

    Attributes:
        dispatch: values of the parameters that are trained whole; no factors.
        batches: of `plan.batch_size` samples.
        loss_scale: for a backbone that computes in float16; None: losses are not scaled.
        before_pass: called before every micro-batch; may raise to stop.
    """

    backbone: Backbone
    dispatch: Dispatch
    batches: Sequence[Sequence[Sample]]
    task: TaskName
    pad_id: int
    loss_scale: LossScale | None = None
    before_pass: Callable[[], None] | None = None


def calibrate(
    order: CalibrationInstruction, bench: Bench, idle_bytes: int | None
) -> tuple[CalibrationReport, bytes]:
    """Do what an accepted instruction asks for; returns the report and the packed sums.

    Args:
        idle_bytes: what this process held before it loaded its base, for a site whose clock is
            real; None: steps are not measured.

    Raises:
        ProtocolError: gradients are not finite.
    """
    started = time.perf_counter()
    passes = [
        part for batch in bench.batches for part in micro_batches(batch, order.plan.micro_batch)
    ]
    sums = importance_sums(order, bench, passes) if order.method is not None else {}
    seconds = time.perf_counter() - started
    step = Step()
    if order.measure_step and idle_bytes is not None:
        step = measured_step(order.plan, bench, idle_bytes)
    tensors = pack_tensors(sums, "fp32")
    samples = [sample for part in passes for sample in part] if order.method is not None else []
    report = CalibrationReport(
        run=order.run,
        device=order.plan.device,
        base_digest=order.base_digest,
        method=order.method,
        samples=len(samples),
        units=loss_units(samples, bench.task),
        tokens=sum(len(sample.tokens) for sample in samples),
        passes=len(passes) if samples else 0,
        tensors_digest=tensors_digest(tensors),
        seconds=seconds,
        step_seconds=step.seconds,
        step_peak_bytes=step.peak_bytes,
    )
    return report, tensors


# ---------------------------------------------------------------- importance


def importance_sums(
    order: CalibrationInstruction, bench: Bench, passes: Sequence[Sequence[TokenisedSample]]
) -> dict[str, FloatArray]:
    """Name, as on the wire -> sum over the passes.

    Raises:
        ProtocolError: gradients are not finite.
    """
    scales = [1.0]
    if bench.loss_scale is not None:
        scales = [share * bench.loss_scale.value for share in _LOWER]
    for scale in scales:
        sums = _sums_at(order, bench, passes, scale)
        if all(np.isfinite(value).all() for value in sums.values()):
            return sums
    raise ProtocolError(
        f"{order.plan.device}: expected finite gradients of the base, found others; "
        "let it compute in fp32 or bf16 (train.compute), or leave it out"
    )


def _sums_at(
    order: CalibrationInstruction,
    bench: Bench,
    passes: Sequence[Sequence[TokenisedSample]],
    scale: float,
) -> dict[str, FloatArray]:
    backbone, plan = bench.backbone, order.plan
    assert order.method is not None
    with backbone.lock:
        # Before anyone looks: a model that is new is first tried on samples of its own.
        batches = [prepare(backbone.model, p, bench.pad_id, bench.task) for p in passes]
        mounted = mount(backbone, bench.dispatch, trainable=False)
        try:
            set_checkpointing(backbone, plan.checkpointing or plan.first_trained_layer > 0)
            with collecting(backbone, order.method, order.rank, order.seed) as collector:
                for batch in batches:
                    if bench.before_pass is not None:
                        bench.before_pass()
                    _gather(backbone, batch, bench.task, scale, collector)
                return collector.tensors()
        finally:
            set_checkpointing(backbone, False)
            unmount(backbone, mounted)


def _gather(
    backbone: Backbone, batch: Batch, task: TaskName, scale: float, collector: Collector
) -> None:
    """One forward and one backward pass of a micro-batch's summed loss."""
    collector.present = batch.present
    total = loss_sum(backbone.model, batch, task)
    factor = 1.0 if scale == 1.0 else scale / max(1, total.units)
    collector.factor = 1.0 / factor
    (total.total * factor).backward()  # type: ignore[no-untyped-call]  # torch's


# ---------------------------------------------------------------- the cost of a step


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step, measured; 0: not measured."""

    seconds: float = 0.0
    peak_bytes: int = 0


def measured_step(plan: DevicePlan, bench: Bench, idle_bytes: int) -> Step:
    """What a step under the plan costs: the fastest of a few, and the most that they held.

    The factors are as large as the plan's, and drawn here; nothing of what they learn is kept.

    Args:
        idle_bytes: of this process before it loaded its base; 0: memory is not measured.
    """
    batches = [bench.batches[i % len(bench.batches)] for i in range(1 + _TIMED_STEPS)]
    dispatch = replace(bench.dispatch, trained=_drawn_factors(plan, bench.backbone))
    device = next(bench.backbone.model.parameters()).device
    ends: list[float] = []

    def note(_index: int, _loss: float) -> None:
        ends.append(time.perf_counter())

    with _watched_peak(device, idle_bytes) as peak:
        train_round(
            bench.backbone,
            batches,
            dispatch,
            replace(plan, local_steps=len(batches)),
            OptimizerSpec(),
            task=bench.task,
            pad_id=bench.pad_id,
            loss_scale=None if bench.loss_scale is None else LossScale(bench.loss_scale.value),
            after_step=note,
            before_pass=bench.before_pass,
        )
    return Step(min(np.diff(ends)), peak.bytes)


def _drawn_factors(plan: DevicePlan, backbone: Backbone) -> dict[str, LoraFactors]:
    """A random, B zero, as in a first round."""
    rng = np.random.default_rng(0)
    found: dict[str, LoraFactors] = {}
    for name, rank in plan.ranks().items():
        layer = backbone.layers[name]
        a = rng.standard_normal((rank, layer.in_features), dtype=np.float32)
        b = np.zeros((layer.out_features, rank), dtype=np.float32)
        found[name] = LoraFactors(a / np.sqrt(np.float32(layer.in_features)), b)
    return found


@dataclass(slots=True)
class _Peak:
    bytes: int = 0


@contextmanager
def _watched_peak(device: torch.device, idle_bytes: int) -> Iterator[_Peak]:
    """The most memory of the place where a step runs, while it runs; 0 where nobody tells.

    On an accelerator: what torch holds there. On a CPU: resident memory of this process beyond
    what it held idle, which Linux tells.
    """
    peak = _Peak()
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    told = idle_bytes > 0 and restart_peak()
    yield peak
    if told:
        peak.bytes = max(0, (peak_resident_bytes() or 0) - idle_bytes)
