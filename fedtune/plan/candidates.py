"""What one device could do: a format, a micro-batch, checkpointing, and how far up the ladder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from fedtune.plan.cost import (
    Load,
    correction_elements,
    peak_bytes,
    step_seconds,
    transfer_seconds,
    upload_bytes,
)
from fedtune.plan.ladder import Ladder
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.records import (
    BACKBONE_FORMATS,
    BLOCK_BITS,
    DEFAULT_BLOCK,
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

TRANSFER_SHARE = 0.25
"""Share of `round_seconds` that both transfers may take. Chosen: steps teach the model, transfers
do not, and a message four times as long buys little more rank than one."""


@dataclass(frozen=True, slots=True)
class Task:
    """One device's planning problem.

    Attributes:
        distortion: what each matrix loses in each form; None where nobody has measured it.
    """

    profile: DeviceProfile
    shapes: ModelShapes
    settings: PlanSettings
    pins: Pins
    ladder: Ladder
    distortion: DistortionTable | None = None

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


@dataclass(frozen=True, slots=True)
class Option:
    """How a device computes, before ranks are granted: all matrices in one form."""

    form: MatrixForm
    micro_batch: int
    checkpointing: bool

    @property
    def format(self) -> FormatName:
        return self.form.format

    def forms(self, shapes: ModelShapes) -> dict[str, MatrixForm]:
        return {matrix.name: self.form for matrix in shapes.matrices}


@dataclass(frozen=True, slots=True)
class Choice:
    """An option with its rank prefix and its tail.

    Attributes:
        length: rungs of the ladder that are granted.
        tail: frozen directions of each matrix beyond the trained ones.
        stopped_by: what refused the next rung; empty when there is none.
    """

    option: Option
    length: int
    tail: int
    stopped_by: str


def options(task: Task, format_name: FormatName) -> Iterator[Option]:
    """Ways to compute in one format, fastest first: checkpointing costs a third of the work."""
    for checkpointing in (False, True) if task.settings.checkpointing else (False,):
        for micro_batch in task.micro_batches():
            yield Option(task.form(format_name), micro_batch, checkpointing)


def shortest(task: Task) -> int:
    """Fewest rungs that a plan may grant: the first one, or all of them under a pinned rank."""
    return len(task.ladder) if task.pins.rank else 1


def smallest_tail(task: Task) -> int:
    """Tail that a plan must leave room for: none, unless every device gets all of it."""
    return task.settings.tail_max if task.settings.whole_tail else 0


def load_of(
    task: Task,
    option: Option,
    length: int,
    tail: int = 0,
    forms: Mapping[str, MatrixForm] | None = None,
) -> Load:
    """What the device computes with the first `length` rungs and a tail.

    Args:
        forms: of each matrix; None takes the option's.
    """
    tail_ranks, tail_elements = _tail_sums(task, length, tail)
    forms = option.forms(task.shapes) if forms is None else forms
    return Load(
        micro_batch=option.micro_batch,
        sequence_length=task.settings.sequence_length,
        checkpointing=option.checkpointing,
        first_trained_layer=task.ladder.first_layer[length],
        trained_elements=task.ladder.elements[length],
        trained_ranks=length,
        tail_elements=tail_elements,
        tail_ranks=tail_ranks,
        correction_elements=sum(
            correction_elements(matrix, forms[matrix.name]) for matrix in task.shapes.matrices
        ),
        dense_parameters=task.settings.dense_parameters,
        task=task.settings.task,
        eager_attention=task.settings.eager_attention,
        whole_matrices=task.profile.accelerator != "cpu",
        itemsize=task.settings.compute_itemsize,
    )


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
    if peak_bytes(task.shapes, forms, load).total > task.profile.budget_bytes:
        return "memory"
    most = task.pins.upload_bytes
    if most and upload_bytes(load, settings.wire_itemsize) > most:
        return "upload size"
    if settings.round_seconds > 0:
        transfer = transfer_seconds(task.profile, load, settings.wire_itemsize)
        if transfer > TRANSFER_SHARE * settings.round_seconds:
            return "upload time"
        step = step_seconds(task.profile, task.shapes, forms, load, settings.batch_size)
        if transfer + step > settings.round_seconds:
            return "round time"
    return ""


def longest(first: int, last: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number in first..last that fits, if fitting never returns once it is lost."""
    if not fits(first):
        return None
    low, high = first, last  # low fits
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def best_choice(task: Task, format_name: FormatName) -> Choice | None:
    """The choice of most rank in one format, and the fastest of those; None if none fits.

    Rank comes before speed because accumulated micro-batches and recomputed activations give the
    same gradients, only later, while a rank that is not granted is lost.
    """
    best: tuple[int, Option] | None = None
    least, tail_least = shortest(task), smallest_tail(task)
    for option in options(task, format_name):
        fits = partial(_fits, task, option, tail=tail_least)
        length = longest(least, len(task.ladder), fits)
        if length is not None and (best is None or length > best[0]):
            best = length, option
    if best is None:
        return None
    length, option = best
    stopped_by = "" if length == len(task.ladder) else refusal(task, option, length + 1, tail_least)
    tail = longest(tail_least, task.settings.tail_max, partial(_fits, task, option, length))
    assert tail is not None
    return Choice(option, length, tail, stopped_by)


def _fits(task: Task, option: Option, length: int, tail: int = 0) -> bool:
    return not refusal(task, option, length, tail)


def _tail_sums(task: Task, length: int, tail: int) -> tuple[int, int]:
    """Sum of tail ranks, and of their elements, over the matrices."""
    if tail == 0:
        return 0, 0
    by_name = task.shapes.by_name()
    ranks = tail_ranks(task, task.ladder.ranks(length), tail)
    elements = (n * (by_name[k].out_features + by_name[k].in_features) for k, n in ranks.items())
    return sum(ranks.values()), sum(elements)
