"""How long a round may take, and what each kind of device does within it.

A fleet's plan is the one of most

    gain_weight * log(gain) - makespan_weight * log(seconds of the slowest device)

where the gain is the mean over the devices, by their samples, of coverage (share of the gain of the
global rank order) times share of the local steps. For a fixed length of the round the devices are
independent, so lengths are tried one after another: from the round in which the quickest kind of
device, that of most coverage per second, does its whole share, to that in which the slowest does.
So the quickest gives up nothing, and a fleet of equal devices does all steps.

Ranks nest: a device takes its rungs from those of every device that can carry more
(`fedtune.plan.nesting`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.plan.candidates import Caps, Pick, Table, best, fewest_seconds, make_table
from fedtune.plan.costs import Costs
from fedtune.plan.limits import NEARLY, round_seconds
from fedtune.plan.mixing import mixed_forms
from fedtune.plan.nesting import caps_by, common_caps, from_the_strongest, within
from fedtune.plan.settings import PlanSettings
from fedtune.plan.settle import search, settle
from fedtune.plan.shortfall import shortfall
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
        settled_within(kind.task, table, limit) for kind, table in zip(kinds, tables, strict=True)
    ]
    seconds = limit
    if settings.makespan_weight > 0:
        longest = _best_length(kinds, tables, alone, settings)
        seconds = min(limit, longest) if longest < _slowest(alone) else limit
    return _nested(kinds, costs, tables, alone, seconds)


def settled_within(
    task: Task,
    table: Table | None,
    seconds: float,
    caps: Caps | None = None,
) -> Settled:
    """The best choice of one kind within a length of the round.

    Raises:
        PlanError: there is none.
    """
    choice: Choice | None = None
    limit = task.settings.round_seconds or math.inf
    for longest in (seconds, seconds * (1 + SLACK), seconds * 1.1):
        pick = None if table is None else best(table, task, min(longest, limit))
        choice = None if pick is None else settle(task, pick, min(longest, limit), caps)
        if choice is not None:
            break
    choice = choice or search(task, limit, caps)
    if choice is None and caps is not None:
        return settled_within(task, table, seconds)
    if choice is None:
        raise shortfall(task)
    seconds = max(seconds, round_seconds(task, choice, choice.option.forms(task.shapes)))
    forms = mixed_forms(task, choice, seconds)
    return Settled(choice, forms, round_seconds(task, choice, forms), choice.coverage(task))


def _slowest(alone: Sequence[Settled]) -> float:
    return max(settled.seconds for settled in alone)


def _best_length(
    kinds: Sequence[Kind],
    tables: Sequence[Table | None],
    alone: Sequence[Settled],
    settings: PlanSettings,
) -> float:
    """The length of a round by which the fleet's plan is best."""
    quickest = max(alone, key=lambda each: each.coverage / max(each.seconds, 1e-30))
    shortest, slowest = quickest.seconds, _slowest(alone)
    if shortest <= 0 or slowest <= shortest * (1 + NEARLY):
        return slowest
    floors = [fewest_seconds(t, kind.task) for kind, t in zip(kinds, tables, strict=True) if t]
    floor = min(max([shortest, *floors]) * (1 + SLACK), slowest)
    even = (shortest * math.pow(slowest / shortest, step / LENGTHS) for step in range(LENGTHS))
    own = (each.seconds for each in alone if each.seconds >= shortest)
    lengths = sorted({floor, *own, *even})
    scored = [(length, _score(kinds, tables, settings, length)) for length in lengths]
    return max(scored, key=lambda each: each[1])[0]


def _score(
    kinds: Sequence[Kind],
    tables: Sequence[Table | None],
    settings: PlanSettings,
    seconds: float,
) -> float:
    """The objective at one length of the round; minus infinity if a kind cannot keep it."""
    picks: list[Pick] = []
    for kind, table in zip(kinds, tables, strict=True):
        pick = None if table is None else best(table, kind.task, seconds * (1 + 1e-6))
        if pick is None:
            return -math.inf
        picks.append(pick)
    weights = sum(kind.weight for kind in kinds)
    gain = sum(kind.weight * pick.gain for kind, pick in zip(kinds, picks, strict=True)) / weights
    slowest = max(pick.seconds for pick in picks)
    return settings.gain_weight * math.log(gain) - settings.makespan_weight * math.log(slowest)


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
            found = settled_within(task, tables[kind], seconds)
        if not within(task, found.choice, caps):
            # The format stays: it was chosen by what memory allows, not by what others have.
            formats = (found.choice.option.format,)
            found = settled_within(task, make_table(task, costs, caps, formats), seconds, caps)
        settled[kind] = found
    return FleetChoice(tuple(settled[kind] for kind in range(len(kinds))), seconds)
