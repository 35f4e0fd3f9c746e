"""The cost model as straight lines in the ranks, so that thousands of options cost one pass.

For a fixed way to compute (`Option`), a peak is the larger of two straight lines in the numbers and
ranks that are trained and sent along, and a step's seconds are one. The lines are found by asking
`fedtune.plan.cost` at a few points, and asked for whole arrays of ranks afterwards. They choose;
what is chosen is checked and reported by the exact functions (`fedtune.plan.limits`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from fedtune.plan.cost import (
    Load,
    correction_elements,
    peak_bytes,
    step_seconds,
    transfer_seconds,
)
from fedtune.plan.limits import bare_load, tail_ranks
from fedtune.plan.task import Option, Task
from fedtune.records import DeviceProfile, MatrixForm, ModelShapes

Array = Float[np.ndarray, " lengths"]

# `Any` below stands for the values of the fields of `Load` that are set by name.
_FEW, _MANY = 64, 1 << 30
"""Ranks at which the slopes of the lower and of the upper line are read."""
_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class PeakLine:
    """A peak in bytes as a function of elements and ranks.

    peak = trained * elements + tail * tail elements + max(low, high), where low and high are
    (intercept, slope) of a line in the sum of trained and tail ranks.
    """

    trained: float
    tail: float
    low: tuple[float, float]
    high: tuple[float, float]

    def of(self, elements: Array, ranks: Array, offset: float) -> Array:
        """The peak without a tail; `offset` is what the backbone takes beyond the reference."""
        low = self.low[0] + self.low[1] * ranks
        high = self.high[0] + self.high[1] * ranks
        return offset + self.trained * elements + np.maximum(low, high)

    def room(self, left: Array, ranks: Array, tail_elements: Array, tail_ranks: Array) -> Array:
        """Share of a tail that fits in the bytes that are left beside `max(low, high)`, 0..1."""
        shares = [
            (left - intercept - slope * ranks)
            / np.maximum(self.tail * tail_elements + slope * tail_ranks, 1e-9)
            for intercept, slope in (self.low, self.high)
        ]
        return np.clip(np.minimum(*shares), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class StepLine:
    """Seconds of a step: fixed + per_pass * passes + trained * elements + tail * tail elements.

    Attributes:
        per_pass: what each further micro-batch of a step adds.
    """

    fixed: float
    per_pass: float
    trained: float
    tail: float


@dataclass(frozen=True, slots=True)
class TransferLine:
    """Seconds of both transfers: fixed + trained * elements + tail * tail elements."""

    fixed: float
    trained: float
    tail: float


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A ladder as arrays; entry i is that of the first i rungs.

    Attributes:
        ranks: sum of trained ranks.
        tail_elements, tail_ranks: of the longest tail beside them.
    """

    elements: Array
    ranks: Array
    gain: Array
    tail_elements: Array
    tail_ranks: Array


class Costs:
    """The lines of a run's model and settings, each found once and shared by all devices."""

    def __init__(self, shapes: ModelShapes) -> None:
        self._shapes = shapes
        self._forms: dict[MatrixForm, tuple[dict[str, MatrixForm], int]] = {}
        self._peaks: dict[tuple[object, ...], PeakLine] = {}
        self._offsets: dict[tuple[object, ...], float] = {}
        self._steps: dict[tuple[object, ...], StepLine] = {}
        self._elements: dict[tuple[object, ...], tuple[float, float]] = {}
        # By identity: a run's tasks and ladders outlive it, and are large to compare.
        self._prefixes: dict[tuple[int, int], Prefixes] = {}
        self._rates_of: dict[int, tuple[object, ...]] = {}
        self._transfers: dict[int, TransferLine] = {}

    def prefixes(self, task: Task, depth: int) -> Prefixes:
        """The task's ladder above a depth, as arrays."""
        key = (id(task.ladders), depth)
        if key not in self._prefixes:
            self._prefixes[key] = _as_arrays(task, depth)
        return self._prefixes[key]

    def transfer(self, task: Task) -> TransferLine:
        """The line of both transfers' seconds."""
        if id(task) not in self._transfers:
            self._transfers[id(task)] = _transfer_line(task)
        return self._transfers[id(task)]

    def peak(self, task: Task, option: Option) -> tuple[PeakLine, float]:
        """The line of an option in a reference form, and what its own form takes beyond that."""
        reference = replace(option, form=MatrixForm("bf16"))
        mode = (*_mode(option), task.whole_matrices, task.itemsize)
        if mode not in self._peaks:
            self._peaks[mode] = _peak_line(lambda **more: self._bytes(task, reference, **more))
        # The form's share depends on nothing else but on what is unpacked at a time.
        key = (option.form, option.checkpointing, task.whole_matrices, task.itemsize)
        if key not in self._offsets:
            own = self._bytes(task, option)
            self._offsets[key] = float(own - self._bytes(task, reference))
        return self._peaks[mode], self._offsets[key]

    def step(self, task: Task, option: Option) -> StepLine:
        """The line of an option's seconds on the task's device; layers are taken to cost alike."""
        key = (self._rates(task), option)
        if key not in self._steps:
            self._steps[key] = self._between(task, option)
        return self._steps[key]

    def _between(self, task: Task, option: Option) -> StepLine:
        """The line at the option's depth, between those at the first and at the last layer."""
        last = self._shapes.layers - 1
        nodes = [0, last] if last else [0]
        lines = [self._step_at(task, replace(option, depth=node)) for node in nodes]
        return StepLine(
            *(
                float(np.interp(option.depth, nodes, [getattr(line, each.name) for line in lines]))
                for each in fields(StepLine)
            )
        )

    def _step_at(self, task: Task, option: Option) -> StepLine:
        """The line, from a step in one pass and one in as many passes as samples."""
        whole = replace(option, micro_batch=task.settings.batch_size)
        key = (self._rates(task), "measured", whole)
        if key not in self._steps:
            batch = task.settings.batch_size
            one = self._seconds(task, whole)
            single = self._seconds(task, replace(whole, micro_batch=1))
            per_pass = (single - one) / (batch - 1) if batch > 1 else 0.0
            self._steps[key] = StepLine(one - per_pass, per_pass, *self._slopes(task, whole))
        return self._steps[key]

    def _slopes(self, task: Task, option: Option) -> tuple[float, float]:
        """Seconds of a trained element and of one of the tail, which no form changes."""
        option = replace(option, form=MatrixForm("bf16"))
        key = (self._rates(task), option)
        if key not in self._elements:
            bare = self._seconds(task, option)
            self._elements[key] = (
                (self._seconds(task, option, trained_elements=_ELEMENTS) - bare) / _ELEMENTS,
                (self._seconds(task, option, tail_elements=_ELEMENTS) - bare) / _ELEMENTS,
            )
        return self._elements[key]

    def _seconds(self, task: Task, option: Option, **more: Any) -> float:
        load = replace(self._load(task, option), **more)
        forms, _ = self._uniform(option.form)
        return step_seconds(
            task.profile,
            self._shapes,
            forms,
            load,
            task.settings.batch_size,
            block_seconds=task.calibration.block_seconds,
        )

    def _rates(self, task: Task) -> tuple[object, ...]:
        key = id(task)
        if key not in self._rates_of:
            self._rates_of[key] = *_rates(task.profile), task.calibration.block_seconds
        return self._rates_of[key]

    def _bytes(self, task: Task, option: Option, **more: Any) -> int:
        load = replace(self._load(task, option), **more)
        return peak_bytes(self._shapes, self._uniform(option.form)[0], load).total

    def _load(self, task: Task, option: Option) -> Load:
        return replace(bare_load(task, option), correction_elements=self._uniform(option.form)[1])

    def _uniform(self, form: MatrixForm) -> tuple[dict[str, MatrixForm], int]:
        """One form for all matrices, and the elements of the pairs that repair them."""
        if form not in self._forms:
            matrices = self._shapes.matrices
            pairs = sum(correction_elements(matrix, form) for matrix in matrices)
            self._forms[form] = {matrix.name: form for matrix in matrices}, pairs
        return self._forms[form]


def _transfer_line(task: Task) -> TransferLine:
    bare = bare_load(task, Option(MatrixForm("bf16"), 1, False, 1))

    def seconds(**more: Any) -> float:
        return transfer_seconds(task.profile, replace(bare, **more), task.settings.wire)

    fixed = seconds()
    return TransferLine(
        fixed=fixed,
        trained=(seconds(trained_elements=_ELEMENTS) - fixed) / _ELEMENTS,
        tail=(seconds(tail_elements=_ELEMENTS) - fixed) / _ELEMENTS,
    )


def _peak_line(bytes_of: Callable[..., int]) -> PeakLine:
    bare = bytes_of()
    few, many = bytes_of(trained_ranks=_FEW), bytes_of(trained_ranks=_MANY)
    steep = (bytes_of(trained_ranks=2 * _MANY) - many) / _MANY
    return PeakLine(
        trained=(bytes_of(trained_elements=_ELEMENTS) - bare) / _ELEMENTS,
        tail=(bytes_of(tail_elements=_ELEMENTS) - bare) / _ELEMENTS,
        low=(float(bare), (few - bare) / _FEW),
        high=(many - steep * _MANY, steep),
    )


def _as_arrays(task: Task, depth: int) -> Prefixes:
    """Sums over the ladder; a rung takes a direction of its matrix's tail where the cap is met."""
    settings, ladder = task.settings, task.ladders.above(depth)
    bare = tail_ranks(task, {}, settings.tail_max)
    by_name = task.shapes.by_name()
    sides = {name: by_name[name].out_features + by_name[name].in_features for name in bare}
    taken = [0.0]
    for rung in ladder.rungs:
        matrix = rung.matrix
        most = min(settings.rank_cap, matrix.out_features, matrix.in_features)
        cut = not settings.whole_tail and 0 <= most - rung.rank < settings.tail_max
        taken.append(float(cut))
    widths = np.array([0, *(rung.elements for rung in ladder.rungs)], dtype=np.float64)
    whole = sum(rank * sides[name] for name, rank in bare.items())
    return Prefixes(
        elements=np.array(ladder.elements, dtype=np.float64),
        ranks=np.arange(len(ladder) + 1, dtype=np.float64),
        gain=np.array(ladder.gain, dtype=np.float64),
        tail_elements=whole - np.cumsum(widths * np.array(taken)),
        tail_ranks=sum(bare.values()) - np.cumsum(taken),
    )


def _mode(option: Option) -> tuple[object, ...]:
    """All of an option but its form."""
    return option.micro_batch, option.checkpointing, option.depth, option.sequence_length


def _rates(profile: DeviceProfile) -> tuple[object, ...]:
    """All of a profile that a step's seconds can depend on."""
    apart = {"name", "device_class", "memory_bytes", "accelerator_memory_bytes"}
    apart |= {"link_bytes_per_s", "formats", "versions"}
    return tuple(
        str(getattr(profile, field.name)) for field in fields(profile) if field.name not in apart
    )
