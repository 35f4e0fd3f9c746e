"""Ranks and forms of a device together, by a mixed-integer program.

The greedy plan grants ranks in one uniform format first, and spends what is left on forms. Where a
distortion table says what every matrix loses in every form, the two trade: a program per kind of
device, at the way to compute and the length of the round that were chosen, maximises

    coverage / greedy coverage - (1 - ENOUGH_GAIN) * error / greedy error

over a form for each matrix and the end of the prefix of the rank order, within memory and the
round's seconds. The exchange rate is that of the greedy plan, which gives up a tenth of the gain
for the next better format: to be rid of the whole error of the base is worth a tenth of the gain.
Without a table the plan has one form per device, and there is nothing to trade.

Source: LQ-LoRA (https://arxiv.org/abs/2311.12023), section 3.1, has the program of the forms; the
prefix of ranks is ours. Solved by HiGHS (`scipy.optimize.milp`), whose limits are on nodes and gap,
which give the same answer on every machine. For the same reason only as many programs are solved as
are sure to end within `plan.solver_seconds`, those of the devices with most samples first. The
others keep their greedy plans and say so, as does one that the time cut short after all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fedtune.plan.candidates import ENOUGH_GAIN, allowed_lengths, option_times
from fedtune.plan.costs import Costs
from fedtune.plan.fleet import FleetChoice, Kind, Settled
from fedtune.plan.limits import device_step, load_of, longest, round_seconds
from fedtune.plan.mixing import allowed_forms, fits, fixed_bytes, form_errors, form_sizes, mixes
from fedtune.plan.nesting import caps_by, common_caps, from_the_strongest
from fedtune.plan.solver_output import without_solver_lines
from fedtune.plan.task import Choice, Task
from fedtune.plan.widths import lower_hull
from fedtune.records import MatrixForm

ENDS = 24
"""Ends of the prefix that a program chooses among; what fits beyond is granted afterwards."""
FEWEST = 0.5
"""Share of the greedy plan's rungs that a program keeps at least."""
GAP = 1e-3
NODES = 200
"""When HiGHS may stop: at this relative gap, or after so many nodes of the search tree."""
BETTER = 1e-4
"""By how much the objective must grow for a program's answer to be taken."""
SECONDS_PER_FORM = 5e-4
"""Time that a program is allowed for each pair of matrix and form; 3100 such pairs, of a model of
224 matrices, took 0.06 to 0.6 s on one core."""
SPARE_BYTES = 256
"""Of the budget, for what the straight lines of the costs round away."""


@dataclass(frozen=True, slots=True)
class Program:
    """The numbers of one device's program; at the greedy plan, `ends` and `forms` are its own.

    Attributes:
        ends: numbers of rungs to choose among, ascending.
        gain: coverage at each end, over the greedy plan's.
        end_bytes: memory at each end beyond that at the first, by each of the peak's two lines.
        end_seconds: the same of a round's seconds.
        errors: of each matrix in each form, over the greedy plan's sum; infinite: not to be had.
        sizes, seconds: bytes of each matrix in each form, and seconds of a round.
        bytes_left: for `sizes` at the first end, by each line.
        seconds_left: for `seconds` at the first end.
    """

    ends: Int[np.ndarray, " ends"]
    gain: Float[np.ndarray, " ends"]
    end_bytes: Float[np.ndarray, "2 ends"]
    end_seconds: Float[np.ndarray, " ends"]
    errors: Float[np.ndarray, "matrices forms"]
    sizes: Float[np.ndarray, "matrices forms"]
    seconds: Float[np.ndarray, "matrices forms"]
    bytes_left: Float[np.ndarray, " 2"]
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Solution:
    """Which end, and which form for each matrix.

    Attributes:
        finished: whether the solver stopped by itself and not by its time.
    """

    end: int
    forms: Int[np.ndarray, " matrices"]
    finished: bool


def refine(kinds: Sequence[Kind], choice: FleetChoice, costs: Costs, seconds: float) -> FleetChoice:
    """The fleet's plan with every kind's program solved, where that is better and fits exactly.

    Args:
        seconds: longest time of all programs together.
    """
    tasks, settled = [kind.task for kind in kinds], list(choice.settled)
    wanted = [
        place for place, task in enumerate(tasks) if mixes(task, choice.settled[place].choice)
    ]
    solved = _affordable(kinds, wanted, seconds)
    order = list(from_the_strongest(tasks)) if wanted else []
    for place, stronger in order:
        if place not in wanted:
            continue
        if place not in solved:
            settled[place] = replace(settled[place], unfinished=True)
            continue
        caps = common_caps(caps_by(tasks[other], settled[other].choice) for other in stronger)
        weaker = [other for other, above in order if place in above]
        least = max((settled[other].choice.end(tasks[other]) for other in weaker), default=0)
        limits = Limits(choice.seconds, least, None if caps is None else caps.end)
        settled[place] = _refined(
            tasks[place], settled[place], costs, limits, seconds / len(solved)
        )
    return replace(choice, settled=tuple(settled))


def _affordable(kinds: Sequence[Kind], wanted: Sequence[int], seconds: float) -> set[int]:
    """The kinds whose programs are solved: those that weigh most, as far as the time is enough."""
    solved: set[int] = set()
    for place in sorted(wanted, key=lambda place: (-kinds[place].weight, place)):
        task = kinds[place].task
        seconds -= SECONDS_PER_FORM * len(task.shapes.matrices) * len(allowed_forms(task))
        if seconds < 0:
            break
        solved.add(place)
    return solved


@dataclass(frozen=True, slots=True)
class Limits:
    """What the rest of the fleet asks of a program.

    Attributes:
        seconds: longest round.
        least_end: place in the fleet's order before which all rungs are kept: weaker devices have
            them.
        most_end: place in it at which the rungs end at the latest; None: where they all end.
    """

    seconds: float
    least_end: int
    most_end: int | None


def _refined(task: Task, greedy: Settled, costs: Costs, limits: Limits, seconds: float) -> Settled:
    """The program's answer, or the greedy one where it is no better or does not fit exactly."""
    forms = allowed_forms(task)
    program = make_program(task, greedy, costs, limits, forms)
    solution = None if program is None else solve(program, seconds)
    if program is None or solution is None:
        return greedy
    marked = replace(greedy, unfinished=not solution.finished)
    held = {
        matrix.name: forms[column]
        for matrix, column in zip(task.shapes.matrices, solution.forms.tolist(), strict=True)
    }
    place = int(np.searchsorted(program.ends, solution.end))
    beyond = program.ends[place + 1] - 1 if place + 1 < len(program.ends) else solution.end
    granted = longest(
        solution.end,
        int(beyond),
        lambda length: fits(task, replace(greedy.choice, length=length), held, limits.seconds),
    )
    if granted is None:
        return marked
    choice = replace(greedy.choice, length=granted, stopped_by=_stopped(greedy.choice, granted))
    if (
        score(task, greedy, choice, held)
        <= score(task, greedy, greedy.choice, greedy.forms) + BETTER
    ):
        return marked
    seconds_now = round_seconds(task, choice, held)
    return Settled(choice, held, seconds_now, choice.coverage(task), not solution.finished)


def _stopped(greedy: Choice, granted: int) -> str:
    """The same limit as the greedy plan's, or memory where rungs were given up for forms."""
    return greedy.stopped_by or ("memory" if granted < greedy.length else "")


def score(task: Task, greedy: Settled, choice: Choice, forms: Mapping[str, MatrixForm]) -> float:
    """The objective of the program, of any choice."""
    coverage = choice.coverage(task) / greedy.coverage
    before = _error(task, greedy.forms)
    lost = _error(task, forms) / before if before > 0 else 0.0
    return coverage - (1 - ENOUGH_GAIN) * lost


def _error(task: Task, forms: Mapping[str, MatrixForm]) -> float:
    assert task.distortion is not None
    place = {form: column for column, form in enumerate(task.distortion.forms)}
    return sum(task.distortion.errors[name][place[form]] for name, form in forms.items())


def make_program(
    task: Task, greedy: Settled, costs: Costs, limits: Limits, forms: list[MatrixForm]
) -> Program | None:
    """The program around a greedy plan; None if its prefix cannot move or nothing is lost."""
    choice, option = greedy.choice, greedy.choice.option
    lost = _error(task, greedy.forms)
    ends = _ends(task, choice, costs, limits)
    if lost <= 0 or not len(ends):
        return None
    prefixes = costs.prefixes(task, option.depth)
    line, _ = costs.peak(task, option)
    factor = task.calibration.bytes_factor
    elements = prefixes.elements[ends] - prefixes.elements[ends[0]]
    lines, tail = (line.low, line.high), load_of(task, option, choice.length, choice.tail)
    ranks = ends + tail.tail_ranks
    sloped = np.array([at + slope * ranks for at, slope in lines])
    fixed = fixed_bytes(task, choice, forms)
    used = max(fixed[forms.index(form)] for form in greedy.forms.values())
    here = max(at + slope * (choice.length + tail.tail_ranks) for at, slope in lines)
    behind = line.trained * float(prefixes.elements[choice.length] - prefixes.elements[ends[0]])
    # Of the greedy plan's bytes but for its matrices, those at the first end, by each line.
    base = used - behind - here + sloped[:, 0]
    errors = np.where(fixed <= used, form_errors(task, forms), np.inf) / lost
    seconds, left = _seconds(task, greedy, limits, forms)
    per_element = choice.steps * costs.step(task, option).trained * task.calibration.seconds_factor
    per_element += costs.transfer(task).trained
    left += per_element * float(prefixes.elements[choice.length] - prefixes.elements[ends[0]])
    return Program(
        ends=ends,
        gain=prefixes.gain[ends] / prefixes.gain[choice.length],
        end_bytes=line.trained * elements + sloped - sloped[:, :1],
        end_seconds=per_element * elements,
        errors=errors,
        sizes=form_sizes(task, forms).astype(np.float64),
        seconds=seconds,
        bytes_left=task.profile.budget_bytes / factor - SPARE_BYTES - base,
        seconds_left=left,
    )


def _ends(task: Task, choice: Choice, costs: Costs, limits: Limits) -> Int[np.ndarray, " ends"]:
    """Numbers of rungs to choose among, evenly apart, the greedy plan's among them."""
    option = choice.option
    prefixes = costs.prefixes(task, option.depth)
    times = option_times(task, costs, option, prefixes)
    positions = np.array(choice.ladder(task).positions)
    allowed = allowed_lengths(task, option, prefixes, times, None)
    least = max(
        math.ceil(FEWEST * choice.length), int(np.searchsorted(positions, limits.least_end))
    )
    most = len(positions) if limits.most_end is None else limits.most_end
    # The rung before an end lies before the most that the fleet leaves open.
    last = positions[allowed - 1]
    allowed = allowed[(allowed >= min(least, choice.length)) & (last < max(most, 1))]
    if task.pins.rank or not len(allowed):
        return np.array([choice.length])
    places = np.linspace(0, len(allowed) - 1, min(ENDS, len(allowed))).round().astype(int)
    return np.unique(np.append(allowed[places], choice.length))


def _seconds(
    task: Task, greedy: Settled, limits: Limits, forms: list[MatrixForm]
) -> tuple[Float[np.ndarray, "matrices forms"], float]:
    """Seconds of a round by the form of each matrix, by its share of the weights, and their sum."""
    choice, matrices = greedy.choice, task.shapes.matrices
    shape = (len(matrices), len(forms))
    if math.isinf(limits.seconds):
        return np.zeros(shape), math.inf
    weights = np.array([matrix.parameters for matrix in matrices], dtype=np.float64)
    steps = []
    for form in forms:
        held = {matrix.name: form for matrix in matrices}
        load = load_of(task, choice.option, choice.length, choice.tail, held)
        steps.append(device_step(task, held, load))
    seconds = choice.steps * np.outer(weights / weights.sum(), np.array(steps))
    columns = [forms.index(greedy.forms[matrix.name]) for matrix in matrices]
    now = float(seconds[np.arange(len(matrices)), columns].sum())
    return seconds, max(limits.seconds, greedy.seconds) - greedy.seconds + now


def solve(program: Program, seconds: float) -> Solution | None:
    """Solve a program; None if no answer was found.

    The variables are one per matrix and form, and one per end after the first, each of which asks
    for the one before it. Rows are scaled so that their right sides are near one.

    Args:
        seconds: after which the solver is stopped.
    """
    rows, columns = np.nonzero(_useful(program))
    forms, ends = len(rows), len(program.ends)
    matrices = len(program.errors)
    cost = np.concatenate(
        [(1 - ENOUGH_GAIN) * program.errors[rows, columns], -np.diff(program.gain)]
    )
    one_form = np.zeros((matrices, forms + ends - 1))
    one_form[rows, np.arange(forms)] = 1
    chain = np.zeros((max(ends - 2, 0), forms + ends - 1))
    places = np.arange(max(ends - 2, 0))
    chain[places, forms + places], chain[places, forms + places + 1] = 1, -1
    used = [
        (np.append(program.sizes[rows, columns], np.diff(more)), left)
        for more, left in zip(program.end_bytes, program.bytes_left, strict=True)
    ]
    if math.isfinite(program.seconds_left):
        time = np.append(program.seconds[rows, columns], np.diff(program.end_seconds))
        used.append((time, program.seconds_left))
    if any(left <= 0 for _, left in used):
        return None
    budgets = np.array([row / left for row, left in used])
    constraints = [
        LinearConstraint(csr_array(one_form), 1, 1),
        LinearConstraint(csr_array(budgets), -np.inf, 1),
    ]
    if len(chain):
        constraints.append(LinearConstraint(csr_array(chain), 0, np.inf))
    with without_solver_lines():
        found = milp(
            cost,
            integrality=np.ones(len(cost), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": seconds, "node_limit": NODES, "mip_rel_gap": GAP},
        )
    if found.x is None:
        return None
    taken = found.x > 0.5
    chosen = np.zeros(matrices, dtype=np.intp)
    chosen[rows[taken[:forms]]] = columns[taken[:forms]]
    end = int(program.ends[int(taken[forms:].sum())])
    stopped = "time limit" in found.message.lower()
    return Solution(end, chosen, not stopped)


def _useful(program: Program) -> np.ndarray:
    """Forms of each matrix on the lower hull of bytes and error, as seconds go with bytes."""
    useful = np.zeros(program.errors.shape, dtype=bool)
    for row, (errors, sizes) in enumerate(zip(program.errors, program.sizes, strict=True)):
        useful[row, lower_hull(errors, sizes)] = True
    return useful
