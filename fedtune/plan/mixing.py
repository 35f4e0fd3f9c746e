"""A form for each matrix: what memory a uniform plan leaves is spent where the base loses most.

A device whose backbone is in a format of few bits has bytes left over more often than not, because
the next format would not fit whole. With a distortion table they buy single matrices a wider
format, or a frozen pair that repairs them, so that the sum of all errors is least. Ranks,
micro-batch, checkpointing and tail stay as they were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int

from fedtune.errors import PlanError
from fedtune.plan.cost import form_bytes, pair_bytes, peak_bytes
from fedtune.plan.limits import NEARLY, load_of, refusal, round_seconds
from fedtune.plan.task import LOSSY_FORMATS, Choice, Task
from fedtune.plan.widths import choose_forms
from fedtune.records import (
    BLOCK_BITS,
    DEFAULT_BLOCK,
    DistortionTable,
    FleetPlan,
    FormatName,
    MatrixForm,
    ModelShapes,
)


def candidate_forms(formats: Iterable[FormatName], rank: int) -> tuple[MatrixForm, ...]:
    """The forms worth measuring for devices that may use these formats.

    Formats of another library (`bnb-...`) are used uniformly or not at all. One block size: within
    a mix, smaller blocks lower the error no more than their bytes do as wider matrices elsewhere.

    Args:
        rank: highest of the pair that repairs a matrix; half of it is a candidate too.
    """
    forms: set[MatrixForm] = set()
    for name in formats:
        if name.startswith("bnb-"):
            continue
        ranks = {0, rank // 2, rank} if name in LOSSY_FORMATS else {0}
        block = DEFAULT_BLOCK if name in BLOCK_BITS else 0
        forms |= {MatrixForm(name, block, correction) for correction in ranks}
    return tuple(sorted(forms))


def may_mix(plan: FleetPlan) -> bool:
    """Whether a distortion table could change a plan that was made without one."""
    return any(
        matrix.format in LOSSY_FORMATS for device in plan.devices for matrix in device.matrices
    )


def check_table(table: DistortionTable, shapes: ModelShapes) -> None:
    """Refuse a table that was measured on something else.

    Raises:
        PlanError: the table is of another base, or lacks a matrix.
    """
    if table.base_digest != shapes.digest:
        raise PlanError(
            f"the distortion table is of base {table.base_digest[:12]}, and the run's base is "
            f"{shapes.digest[:12]}; measure this one with: fedtune measure RUN.toml"
        )
    missing = [matrix.name for matrix in shapes.matrices if matrix.name not in table.errors]
    if missing:
        raise PlanError(
            f"the distortion table lacks {missing[0]}; measure again with: fedtune measure RUN.toml"
        )


def mixed_forms(task: Task, choice: Choice, seconds: float) -> dict[str, MatrixForm]:
    """The form of each matrix: that of the choice, or better ones as far as its leftover goes.

    The total error is never above that of the uniform choice, nor the peak above the budget.

    Args:
        seconds: longest round with the choice's steps.
    """
    uniform = choice.option.forms(task.shapes)
    if not mixes(task, choice):
        return uniform
    forms = allowed_forms(task)
    errors, sizes = form_errors(task, forms), form_sizes(task, forms)
    least, best = float(errors[:, forms.index(choice.option.form)].sum()), uniform
    fixed = fixed_bytes(task, choice, forms)
    budget = int(task.profile.budget_bytes / task.calibration.bytes_factor)
    # Some forms need more workspace; only where one of them is used is there less for the rest.
    for most in np.unique(fixed).tolist():
        usable = np.where(fixed <= most, errors, np.inf)
        chosen = choose_forms(usable, sizes, budget - most)
        if chosen is None:
            continue
        found = {
            matrix.name: forms[column]
            for matrix, column in zip(task.shapes.matrices, chosen.tolist(), strict=True)
        }
        left = float(errors[np.arange(len(chosen)), chosen].sum())
        # Wider matrices take longer to read, which a round's seconds may not allow.
        if left < least and fits(task, choice, found, seconds):
            least, best = left, found
    return best


def mixes(task: Task, choice: Choice) -> bool:
    """Whether matrices of the choice may have forms of their own."""
    return choice.option.format in LOSSY_FORMATS and choice.option.form in allowed_forms(task)


def fits(task: Task, choice: Choice, forms: Mapping[str, MatrixForm], seconds: float) -> bool:
    """Whether a choice keeps every limit and its round these seconds with a form per matrix."""
    option = choice.option
    if refusal(task, option, choice.length, choice.tail, forms):
        return False
    return round_seconds(task, choice, forms) <= seconds * (1 + NEARLY)


def allowed_forms(task: Task) -> list[MatrixForm]:
    """The table's forms that the device may use."""
    if task.distortion is None:
        return []
    formats, pinned = task.formats(), task.pins.correction_rank

    def allowed(form: MatrixForm) -> bool:
        if form.format not in formats:
            return False
        if pinned is not None and form.format in LOSSY_FORMATS:
            return form.correction_rank == pinned
        return form.correction_rank <= task.settings.correction_rank

    return [form for form in task.distortion.forms if allowed(form)]


def form_errors(task: Task, forms: list[MatrixForm]) -> Float[np.ndarray, "matrices forms"]:
    """What each matrix loses in each form."""
    assert task.distortion is not None
    columns = [task.distortion.forms.index(form) for form in forms]
    errors = task.distortion.errors
    return np.array(
        [[errors[matrix.name][column] for column in columns] for matrix in task.shapes.matrices]
    )


def form_sizes(task: Task, forms: list[MatrixForm]) -> Int[np.ndarray, "matrices forms"]:
    """Bytes of each matrix with its correction, in each form."""
    return np.array(
        [
            [form_bytes(matrix, form) + pair_bytes(matrix, form) for form in forms]
            for matrix in task.shapes.matrices
        ],
        dtype=np.int64,
    )


def fixed_bytes(task: Task, choice: Choice, forms: list[MatrixForm]) -> Int[np.ndarray, " forms"]:
    """The peak but for the matrices and their corrections, if all matrices have that form.

    A matrix is unpacked by itself, so a mix needs no more than the worst of its forms.
    """
    load = load_of(task, choice.option, choice.length, choice.tail)
    names = [matrix.name for matrix in task.shapes.matrices]
    peaks = [peak_bytes(task.shapes, dict.fromkeys(names, form), load) for form in forms]
    return np.array([peak.total - peak.backbone - peak.correction for peak in peaks])
