"""One device's planning problem, what it could do, and what was chosen for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fedtune.plan.ladder import Ladder, Ladders
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.records import (
    BACKBONE_FORMATS,
    BLOCK_BITS,
    DEFAULT_BLOCK,
    CostCalibration,
    DeviceProfile,
    DistortionTable,
    FormatName,
    MatrixForm,
    ModelShapes,
)

LOSSY_FORMATS: frozenset[FormatName] = frozenset(
    name for name, bits in BLOCK_BITS.items() if bits <= 4
)
"""Formats that lose enough for single matrices to be worth more bits, or a pair that repairs them:
4 bits lose 9 % of a matrix, 8 bits half a per cent."""

SEQUENCE_STEPS = 8
"""Lengths that are tried between the whole samples and the shortest allowed."""


@dataclass(frozen=True, slots=True)
class Task:
    """One device's planning problem.

    Attributes:
        distortion: what each matrix loses in each form; None where nobody has measured it.
        calibration: measured costs of its class over the predicted.
    """

    profile: DeviceProfile
    shapes: ModelShapes
    settings: PlanSettings
    pins: Pins
    ladders: Ladders
    distortion: DistortionTable | None = None
    calibration: CostCalibration = field(default_factory=CostCalibration)

    @property
    def itemsize(self) -> int:
        """Bytes of one activation on the device."""
        return self.settings.itemsize(self.profile)

    @property
    def whole_matrices(self) -> bool:
        """Whether a product unpacks a whole matrix, as on an accelerator."""
        return self.profile.accelerator != "cpu"

    @property
    def upload_limit(self) -> int:
        """Largest update in bytes; 0: no limit."""
        limits = [limit for limit in (self.pins.upload_bytes, self.settings.upload_bytes) if limit]
        return min(limits, default=0)

    def formats(self) -> tuple[FormatName, ...]:
        """Formats to try, best first."""
        wanted = BACKBONE_FORMATS if self.pins.format is None else (self.pins.format,)
        return tuple(name for name in wanted if name in self.profile.formats)

    def form(self, format_name: FormatName) -> MatrixForm:
        """How a matrix is held when all have the same format."""
        block = DEFAULT_BLOCK if format_name in BLOCK_BITS else 0
        repaired = format_name in LOSSY_FORMATS
        return MatrixForm(format_name, block, self.pins.correction_rank or 0 if repaired else 0)

    def micro_batches(self) -> tuple[int, ...]:
        """Sizes to try, largest first: powers of two that divide the batch size."""
        if self.pins.micro_batch:
            return (self.pins.micro_batch,)
        largest = self.settings.batch_size & -self.settings.batch_size
        return tuple(1 << power for power in reversed(range(largest.bit_length())))

    def depths(self) -> tuple[int, ...]:
        """Layers at which backpropagation may end; only the lowest under a pinned rank."""
        depths = self.ladders.depths()
        return depths[:1] if self.pins.rank else depths

    def sequence_lengths(self) -> tuple[int, ...]:
        """Longest samples to try: whole ones, then, if samples may be cut, ever shorter ones."""
        whole, least = self.settings.sequence_length, self.settings.shortest_sequence
        if not 0 < least < whole:
            return (whole,)
        steps = range(SEQUENCE_STEPS + 1)
        lengths = {whole - (whole - least) * step // SEQUENCE_STEPS for step in steps}
        return tuple(sorted(lengths, reverse=True))


@dataclass(frozen=True, slots=True)
class Option:
    """How a device computes, before ranks are granted: all matrices in one form.

    Attributes:
        depth: nothing is trained below this layer; backpropagation stops there or above.
    """

    form: MatrixForm
    micro_batch: int
    checkpointing: bool
    sequence_length: int
    depth: int = 0

    @property
    def format(self) -> FormatName:
        return self.form.format

    def forms(self, shapes: ModelShapes) -> dict[str, MatrixForm]:
        return {matrix.name: self.form for matrix in shapes.matrices}


@dataclass(frozen=True, slots=True)
class Choice:
    """An option with its rank prefix, its tail and its steps.

    Attributes:
        length: rungs that are granted of the ladder above the option's depth.
        tail: frozen directions of each matrix beyond the trained ones.
        steps: optimiser steps in a round.
        stopped_by: what refused the next rung; empty when there is none.
    """

    option: Option
    length: int
    tail: int
    steps: int
    stopped_by: str

    def ladder(self, task: Task) -> Ladder:
        """The ladder of which the choice is a prefix."""
        return task.ladders.above(self.option.depth)

    def end(self, task: Task) -> int:
        """Place in the fleet's order before which all of the ladder's rungs are granted."""
        return self.ladder(task).positions[self.length]

    def coverage(self, task: Task) -> float:
        """Share of the gain of the fleet's whole order, 0..1."""
        return self.ladder(task).gain[self.length] / task.ladders.whole_gain


def options(task: Task, format_name: FormatName, length: int, depth: int = 0) -> Iterator[Option]:
    """Ways to compute in one format at one length of samples, the fastest first."""
    for checkpointing in (False, True) if task.settings.checkpointing else (False,):
        for micro_batch in task.micro_batches():
            yield Option(task.form(format_name), micro_batch, checkpointing, length, depth)


def shortest(task: Task, depth: int = 0) -> int:
    """Fewest rungs that a plan may grant: the first one, or all of them under a pinned rank."""
    return len(task.ladders.above(depth)) if task.pins.rank else 1


def smallest_tail(task: Task) -> int:
    """Tail that a plan must leave room for: none, unless every device gets all of it."""
    return task.settings.tail_max if task.settings.whole_tail else 0
