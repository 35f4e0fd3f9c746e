"""How long a round may take, and what each kind of device does within it.

A fleet's plan is the one of most

    gain_weight * log(gain) - makespan_weight * log(seconds of the slowest device)

where the gain is the geometric mean over the devices, by their samples, of coverage (share of the
gain of the global rank order) times share of the local steps. The geometric mean is proportionally
fair: an arithmetic one gains most by leaving slow devices next to nothing, and the joined model
then settles on the data of the quick ones (`benchmarks/fleet.py`).

For a fixed length of the round the devices are independent, so lengths are tried one after another:
from the round in which the quickest kind of device, that of most coverage per second, does its
whole share, to that in which the slowest does. So the quickest gives up nothing, and a fleet of
equal devices does all steps.

Ranks nest: a device takes its rungs from those of every device that can carry more
(`fedtune.plan.nesting`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.plan.candidates import Caps, Table, best, fewest_seconds, make_table
from fedtune.plan.costs import Costs
from fedtune.plan.limits import NEARLY, round_seconds
from fedtune.plan.mixing import mixed_forms
from fedtune.plan.nesting import caps_by, common_caps, from_the_strongest, within
from fedtune.plan.settings import PlanSettings
from fedtune.plan.settle import search, settle
from fedtune.plan.shortfall import can_fit, shortfall
from fedtune.plan.task import Choice, Task
from fedtune.records import MatrixForm

LENGTHS = 33
"""Lengths of a round that are tried, evenly apart by ratio, beside each kind's own."""

SLACK = 1e-3
"""Share of a round by which the straight lines of candidates may be off: the shortest round in
which every device has a candidate is taken as longer by it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Devices that differ in nothing but their names.

    Attributes:
        weight: what their gain counts: their samples, or their number.
    """

    task: Task
    weight: float


@dataclass(frozen=True, slots=True)
class Settled:
    """What a kind of device does.

    Attributes:
        forms: of each matrix.
        seconds: predicted, of a round.
        coverage: share of the gain of the fleet's order of ranks.
        unfinished: whether a mixed-integer program was stopped by its limit.
    """

    choice: Choice
    forms: Mapping[str, MatrixForm]
    seconds: float
    coverage: float
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class FleetChoice:
    """What every kind does, in the order of the kinds.

    Attributes:
        seconds: longest round that was allowed; infinite if none was set.
    """

    settled: tuple[Settled, ...]
    seconds: float

    def pacer(self) -> int:
        """The kind whose round is the longest."""
        return max(range(len(self.settled)), key=lambda kind: self.settled[kind].seconds)


def choose_fleet(kinds: Sequence[Kind], settings: PlanSettings, costs: Costs) -> FleetChoice:
    """A choice for every kind of device.

    Raises:
        PlanError: a device cannot carry even the smallest plan.
    """
    limit = settings.round_seconds or math.inf
    tables = [make_table(kind.task, costs) for kind in kinds]
    alone = [
        settled_alone(kind.task, table, limit) for kind, table in zip(kinds, tables, strict=True)
    ]
    seconds = limit
    if settings.makespan_weight > 0:
        longest = _best_length(kinds, tables, alone, settings)
        seconds = min(limit, longest) if longest < _slowest(alone) else limit
    return _nested(kinds, costs, tables, alone, seconds)


def settled_alone(task: Task, table: Table | None, limit: float) -> Settled:
    """What a kind does if no other device matters.

    Raises:
        PlanError: it cannot carry even the smallest plan.
    """
    found = settled_within(task, table, limit)
    if found is None and can_fit(task):
        choice = search(task, limit)
        found = None if choice is None else _with_forms(task, choice, limit)
    if found is None:
        raise shortfall(task)
    return found


def settled_within(
    task: Task, table: Table | None, seconds: float, caps: Caps | None = None
) -> Settled | None:
    """The best choice of one kind within a length of the round; None if it has none.

    The length is stretched by a little where the straight lines of the table promised too much.
    """
    limit = task.settings.round_seconds or math.inf
    for longest in (seconds, seconds * (1 + SLACK), seconds * 1.1):
        longest = min(longest, limit)
        pick = None if table is None else best(table, task, longest)
        choice = None if pick is None else settle(task, pick, longest, caps)
        if choice is not None:
            return _with_forms(task, choice, longest)
    return None


def _with_forms(task: Task, choice: Choice, seconds: float) -> Settled:
    forms = mixed_forms(task, choice, seconds)
    return Settled(choice, forms, round_seconds(task, choice, forms), choice.coverage(task))


def _gain_per_second(settled: Settled) -> float:
    return settled.coverage * settled.choice.steps / settled.seconds


def _slowest(alone: Sequence[Settled]) -> float:
    return max(settled.seconds for settled in alone)


def _best_length(
    kinds: Sequence[Kind],
    tables: Sequence[Table | None],
    alone: Sequence[Settled],
    settings: PlanSettings,
) -> float:
    """The length of a round by which the fleet's plan is best."""
    slowest = _slowest(alone)
    timed = [each for each in alone if each.seconds > 0]  # the others say nothing of their rates
    quickest = max(timed, key=_gain_per_second, default=alone[0])
    shortest = quickest.seconds
    if slowest <= shortest * (1 + NEARLY):
        return slowest
    floors = [fewest_seconds(t, kind.task) for kind, t in zip(kinds, tables, strict=True) if t]
    floor = min(max([shortest, *floors]) * (1 + SLACK), slowest)
    even = (shortest * math.pow(slowest / shortest, step / LENGTHS) for step in range(LENGTHS))
    own = (each.seconds for each in alone if each.seconds >= shortest)
    lengths = sorted({floor, *own, *even})
    whole = [
        Outcome(each.coverage * each.choice.steps / settings.local_steps, each.seconds)
        for each in alone
    ]
    scored = [(_score(kinds, tables, whole, settings, length), length) for length in lengths]
    best_score = max(score for score, _ in scored)
    return max(length for score, length in scored if score >= best_score)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round of a kind gains, and how long it is."""

    gain: float
    seconds: float


def _score(
    kinds: Sequence[Kind],
    tables: Sequence[Table | None],
    whole: Sequence[Outcome],
    settings: PlanSettings,
    seconds: float,
) -> float:
    """The objective at one length of the round; minus infinity if a kind cannot keep it.

    Args:
        whole: of each kind alone; stands for one without candidates.
    """
    found: list[Outcome] = []
    for kind, table, own in zip(kinds, tables, whole, strict=True):
        pick = None if table is None else best(table, kind.task, seconds * (1 + 1e-6))
        if table is not None and pick is None:
            return -math.inf
        found.append(own if pick is None else Outcome(pick.gain, pick.seconds))
    weights = sum(kind.weight for kind in kinds)
    gains = (kind.weight * math.log(each.gain) for kind, each in zip(kinds, found, strict=True))
    slowest = max(each.seconds for each in found)
    return settings.gain_weight * sum(gains) / weights - settings.makespan_weight * math.log(
        slowest
    )


def _nested(
    kinds: Sequence[Kind],
    costs: Costs,
    tables: Sequence[Table | None],
    alone: Sequence[Settled],
    seconds: float,
) -> FleetChoice:
    """Every kind within the length, and within the rungs of those that can carry more."""
    tasks = [kind.task for kind in kinds]
    settled: dict[int, Settled] = {}
    for kind, stronger in from_the_strongest(tasks):
        task = tasks[kind]
        caps = common_caps(caps_by(tasks[other], settled[other].choice) for other in stronger)
        found = alone[kind]
        if found.seconds > seconds * (1 + NEARLY):
            found = settled_within(task, tables[kind], seconds) or found
        if not within(task, found.choice, caps):
            # The format stays: it was chosen by what memory allows, not by what others have.
            formats = (found.choice.option.format,)
            table = make_table(task, costs, caps, formats)
            found = settled_within(task, table, seconds, caps) or found
        settled[kind] = found
    return FleetChoice(tuple(settled[kind] for kind in range(len(kinds))), seconds)
