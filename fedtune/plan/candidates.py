"""All that one device could do, as columns of numbers, and the best of it within a time.

A row is an option (format, micro-batch, checkpointing, depth, length of samples) with a number of
granted rungs. Rows come from straight lines in the ranks (`fedtune.plan.costs`), so a model of
hundreds of matrices has its thousands of rows in some milliseconds. Which row is best depends on
the seconds that a round may take, and on what stronger devices of the fleet leave open.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int

from fedtune.plan.costs import Costs, Prefixes
from fedtune.plan.limits import NEARLY, TRANSFER_SHARE
from fedtune.plan.task import Option, Task, options, shortest
from fedtune.records import FormatName

ENOUGH_GAIN = 0.9
"""Share of the reachable gain below which a better format is given up for more rank. Chosen: with
the prior, nine tenths are 12 of 16 ranks, and the last ranks gain least."""

GAIN_SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the most gain that an option's memory allows at which it is a candidate: fewer ranks
make messages shorter and steps a little faster."""

Numbers = Float[np.ndarray, " rows"]


@dataclass(frozen=True, slots=True)
class Caps:
    """What a device may have at most, so that its ranks nest in those of stronger ones.

    Attributes:
        end: place in the fleet's order at which its rungs end.
        depth: lowest layer that it may train.
    """

    end: int
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of candidates; equal columns.

    Attributes:
        options: what `option` counts.
        format: place of the option's format among the device's, the best first.
        carried: whether memory allows the row; others say what could be reached.
        coverage: share of the gain of the fleet's order.
        step, tail_step: seconds of a step without a tail, and what the longest tail adds.
        transfer, tail_transfer: the same of both transfers.
        tail: share of the longest tail for which there is memory.
        longest: whether the row has all rungs that its option allows.
    """

    options: tuple[Option, ...]
    option: Int[np.ndarray, " rows"]
    length: Int[np.ndarray, " rows"]
    format: Int[np.ndarray, " rows"]
    carried: Bool[np.ndarray, " rows"]
    coverage: Numbers
    step: Numbers
    tail_step: Numbers
    transfer: Numbers
    tail_transfer: Numbers
    tail: Numbers
    longest: Bool[np.ndarray, " rows"]


@dataclass(frozen=True, slots=True)
class Pick:
    """The best row of a table within a time.

    Attributes:
        gain: coverage times share of the local steps.
        most: the most gain that any format gives; never less on a device that can carry more.
        tail: share of the longest tail for which there is memory.
        longest: whether the row has all rungs that its option allows.
    """

    option: Option
    length: int
    steps: int
    gain: float
    most: float
    seconds: float
    tail: float
    longest: bool


def make_table(
    task: Task,
    costs: Costs,
    caps: Caps | None = None,
    formats: Sequence[FormatName] | None = None,
) -> Table | None:
    """All candidates of a device at the longest samples it can carry; None if it carries none.

    Args:
        formats: None takes all of the device's.
    """
    formats = task.formats() if formats is None else formats
    for length in task.sequence_lengths():
        table = _table(task, costs, formats, length, caps)
        if table is not None and table.carried.any():
            return table
    return None


def best(table: Table, task: Task, seconds: float) -> Pick | None:
    """The best row whose round takes at most these seconds; None if there is none.

    The best format whose coverage is `ENOUGH_GAIN` of what could be reached if memory did not
    count, or else the format of most coverage: no format is given up for more steps. In it the
    most gain, then the most coverage, then the least seconds.
    """
    steps, took = _steps(table, task, seconds)
    gain = table.coverage * steps / task.settings.local_steps
    rows = np.flatnonzero((steps >= 1) & table.carried)
    if not len(rows):
        return None
    reachable = float(table.coverage[steps >= 1].max())
    formats, most = table.format[rows], float(gain[rows].max())
    places = np.unique(formats)
    covered = np.array([table.coverage[rows[formats == place]].max() for place in places])
    enough = np.flatnonzero(covered >= ENOUGH_GAIN * reachable * (1 - NEARLY))
    chosen = enough[0] if len(enough) else int(np.argmax(covered >= covered.max() * (1 - NEARLY)))
    rows = rows[formats == places[chosen]]
    for key in (gain, table.coverage, -took):
        values = key[rows]
        rows = rows[values >= values.max() - NEARLY * abs(values.max())]
    row = rows[0]
    return Pick(
        option=table.options[table.option[row]],
        length=int(table.length[row]),
        steps=int(steps[row]),
        gain=float(gain[row]),
        most=most,
        seconds=float(took[row]),
        tail=float(table.tail[row]),
        longest=bool(table.longest[row]),
    )


def fewest_seconds(table: Table, task: Task) -> float:
    """The shortest round of any candidate: one local step, or all if all are wanted."""
    steps = task.settings.local_steps if all_steps_wanted(task, 0.0) else 1
    return float((table.transfer + steps * table.step)[table.carried].min())


def most_steps(task: Task, seconds: float, step: float, transfer: float) -> int:
    """Local steps that fit in a round's seconds after both transfers; 0 if none does."""
    wanted = task.settings.local_steps
    if np.isinf(seconds) or step <= 0:
        return wanted if transfer <= seconds else 0
    fitting = int((seconds - transfer) / step * (1 + NEARLY) + NEARLY)
    if all_steps_wanted(task, seconds) and fitting < wanted:
        return 0
    return max(0, min(wanted, fitting))


def all_steps_wanted(task: Task, seconds: float) -> bool:
    """Whether a plan of fewer local steps is none; a limit of the run file may force them."""
    limit = task.settings.round_seconds
    return task.settings.steps == "equal" and not 0 < limit <= seconds


def _steps(
    table: Table, task: Task, seconds: float
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Local steps of every row within a time, and the seconds of its round."""
    wanted = task.settings.local_steps
    step, transfer = table.step, table.transfer
    if np.isinf(seconds):
        steps = np.full(len(step), float(wanted))
    else:
        share = table.tail
        if not task.settings.whole_tail:
            room = np.maximum(seconds - transfer - wanted * step, TRANSFER_SHARE * seconds)
            cost = table.tail_transfer + wanted * table.tail_step
            share = np.minimum(share, np.clip(room / np.maximum(cost, 1e-30), 0, 1))
        step = step + share * table.tail_step
        transfer = transfer + share * table.tail_transfer
        fitting = (seconds - transfer) / np.maximum(step, 1e-30)
        steps = np.clip(np.floor(fitting * (1 + 1e-6) + NEARLY), 0, wanted)
        if all_steps_wanted(task, seconds):
            steps[steps < wanted] = 0
    return steps, transfer + steps * step


def _table(
    task: Task,
    costs: Costs,
    formats: Sequence[FormatName],
    sequence_length: int,
    caps: Caps | None,
) -> Table | None:
    parts: list[dict[str, np.ndarray]] = []
    found: list[Option] = []
    depths = task.depths()
    if caps is not None:
        depths = tuple(sorted({caps.depth, *(depth for depth in depths if depth > caps.depth)}))
    for place, name in enumerate(formats):
        roomy = True
        for depth in depths:
            ways = options(task, name, sequence_length, depth)
            for option, columns, complete in _rows(task, costs, ways, caps):
                count = len(columns["length"])
                columns["option"] = np.full(count, len(found))
                columns["format"] = np.full(count, place)
                parts.append(columns)
                found.append(option)
                fastest = option.micro_batch == task.micro_batches()[0]
                roomy &= complete or not fastest or option.checkpointing
        if roomy and parts:
            break  # the fastest ways have memory for all rungs: no worse format is better
    if not parts:
        return None
    names = [field.name for field in fields(Table) if field.name != "options"]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Table(options=tuple(found), **columns)


def _rows(
    task: Task, costs: Costs, ways: Iterator[Option], caps: Caps | None
) -> Iterator[tuple[Option, dict[str, np.ndarray], bool]]:
    """Candidates of one format and depth: what could be reached, then what memory allows.

    A way is left out where a faster one already carries all rungs. The last value says whether
    memory refuses none of the rungs that the other limits allow.
    """
    settled = 0  # micro-batch of a way without recomputation that carries all rungs
    for place, option in enumerate(ways):
        if place and option.micro_batch <= settled:
            continue
        prefixes = costs.prefixes(task, option.depth)
        times = option_times(task, costs, option, prefixes)
        allowed = allowed_lengths(task, option, prefixes, times, caps)
        if not len(allowed):
            continue
        peaks, tails = _memory(task, costs, option, prefixes)
        carried = allowed[peaks[allowed] <= task.profile.budget_bytes]
        complete = len(carried) == len(allowed)
        if place == 0:
            whole = np.ones(len(prefixes.elements))
            yield option, _columns(task, prefixes, times, allowed, whole, carried=False), complete
        if not len(carried):
            continue
        yield option, _columns(task, prefixes, times, carried, tails, carried=True), complete
        if complete:
            settled = max(settled, option.micro_batch)


def allowed_lengths(
    task: Task, option: Option, prefixes: Prefixes, times: Times, caps: Caps | None
) -> Int[np.ndarray, " lengths"]:
    """Numbers of rungs that every limit but memory lets pass."""
    settings, ladder = task.settings, task.ladders.above(option.depth)
    lengths = np.arange(shortest(task, option.depth), len(ladder) + 1)
    if caps is not None:
        lengths = lengths[
            : np.searchsorted(lengths, bisect_left(ladder.positions, caps.end), "right")
        ]
    elements = prefixes.elements[lengths]
    fits = np.ones(len(lengths), dtype=bool)
    if task.upload_limit:
        numbers = elements + settings.dense_parameters
        update = np.ceil(numbers * settings.wire.up) + settings.wire.header_bytes
        fits &= update <= task.upload_limit
    if settings.round_seconds > 0:
        step, transfer = times.step[lengths], times.transfer[lengths]
        fits &= transfer <= TRANSFER_SHARE * settings.round_seconds
        fits &= transfer + step <= settings.round_seconds
    return lengths[fits]


def _memory(
    task: Task, costs: Costs, option: Option, prefixes: Prefixes
) -> tuple[Numbers, Numbers]:
    """Peak bytes of every number of rungs, and the share of the longest tail beside them."""
    line, offset = costs.peak(task, option)
    factor, ranks = task.calibration.bytes_factor, prefixes.ranks
    if task.settings.whole_tail:
        peaks = line.of(prefixes.elements, ranks + prefixes.tail_ranks, offset)
        return factor * (peaks + line.tail * prefixes.tail_elements), np.ones(len(ranks))
    left = task.profile.budget_bytes / factor - offset - line.trained * prefixes.elements
    tails = line.room(left, ranks, prefixes.tail_elements, prefixes.tail_ranks)
    return factor * line.of(prefixes.elements, ranks, offset), tails


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a step and of both transfers, by rungs; what the longest tail adds to each.

    Where the whole tail is a must, it is in the first two, and adds nothing.
    """

    step: Numbers
    transfer: Numbers
    tail_step: Numbers
    tail_transfer: Numbers

    def at(self, lengths: Int[np.ndarray, " lengths"]) -> dict[str, np.ndarray]:
        """The columns of a table at some numbers of rungs."""
        return {field.name: getattr(self, field.name)[lengths] for field in fields(self)}


def option_times(task: Task, costs: Costs, option: Option, prefixes: Prefixes) -> Times:
    """The seconds of an option with every number of rungs."""
    line, transfer = costs.step(task, option), costs.transfer(task)
    factor = task.calibration.seconds_factor
    fixed = line.fixed + line.per_pass * task.settings.batch_size / option.micro_batch
    steps = factor * (fixed + line.trained * prefixes.elements)
    transfers = transfer.fixed + transfer.trained * prefixes.elements
    tail_steps = factor * line.tail * prefixes.tail_elements
    tail_transfers = transfer.tail * prefixes.tail_elements
    if not task.settings.whole_tail:
        return Times(steps, transfers, tail_steps, tail_transfers)
    nothing = np.zeros_like(steps)
    return Times(steps + tail_steps, transfers + tail_transfers, nothing, nothing)


def _columns(
    task: Task,
    prefixes: Prefixes,
    times: Times,
    allowed: Int[np.ndarray, " lengths"],
    tails: Numbers,
    carried: bool,
) -> dict[str, np.ndarray]:
    """The rows of one option, as columns, at some of the allowed numbers of rungs."""
    shares = np.array(GAIN_SHARES) * prefixes.gain[allowed[-1]]
    places = np.searchsorted(prefixes.gain[allowed], shares * (1 - NEARLY))
    lengths = allowed[np.unique(np.append(places, 0))]
    return {
        "length": lengths,
        "carried": np.full(len(lengths), carried),
        "coverage": prefixes.gain[lengths] / task.ladders.whole_gain,
        "tail": tails[lengths],
        "longest": lengths == allowed[-1],
        **times.at(lengths),
    }
