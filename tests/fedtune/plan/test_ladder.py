from __future__ import annotations

import pytest

from fedtune.errors import PlanError
from fedtune.plan.ladder import global_rungs, make_ladder
from fedtune.plan.settings import PlanSettings
from fedtune.records import ImportanceReport, MatrixShape, ModelShapes

SMALL, LARGE = MatrixShape("small", 8, 8, 0), MatrixShape("large", 30, 10, 1)
TWIN = MatrixShape("twin", 8, 8, 1)


def shapes(*matrices: MatrixShape) -> ModelShapes:
    return ModelShapes("0", "llama", 8, 30, 2, 2, 16, matrices, 100)


def settings(**changes: object) -> PlanSettings:
    values: dict[str, object] = {
        "rank_max": 4,
        "rank_cap": 8,
        "batch_size": 4,
        "local_steps": 1,
        "sequence_length": 8,
    }
    return PlanSettings(**(values | changes))  # type: ignore[arg-type]


def steps(*matrices: MatrixShape, **changes: object) -> list[tuple[str, int]]:
    rungs = global_rungs(shapes(*matrices), settings(**changes), 4)
    return [(rung.matrix.name, rung.rank) for rung in rungs]


def test_the_prior_gives_smaller_matrices_more_rank() -> None:
    # gain per byte: small 1/16, 1/32, 1/48, 1/64; large 1/40, 1/80, 1/120, 1/160
    assert steps(LARGE, SMALL) == [
        ("small", 1),
        ("small", 2),
        ("large", 1),
        ("small", 3),
        ("small", 4),
        ("large", 2),
        ("large", 3),
        ("large", 4),
    ]


def test_ties_go_to_the_later_layer() -> None:
    assert steps(SMALL, TWIN)[:4] == [("twin", 1), ("small", 1), ("twin", 2), ("small", 2)]


def test_a_rank_never_exceeds_the_matrix() -> None:
    assert len(steps(MatrixShape("thin", 2, 50, 0))) == 2


def test_only_named_matrices_are_trained() -> None:
    assert {name for name, _ in steps(SMALL, LARGE, trainable=("large",))} == {"large"}


def test_measured_gains_decide_and_ranks_stay_in_order() -> None:
    report = ImportanceReport({"small": (1.0, 5.0, 0.5), "large": (100.0, 0.0)})
    rungs = global_rungs(shapes(SMALL, LARGE), settings(), 4, report)
    assert [(r.matrix.name, r.rank) for r in rungs] == [
        ("large", 1),
        ("small", 1),
        ("small", 2),
        ("small", 3),
    ]


def test_running_sums_follow_the_rungs() -> None:
    ladder = make_ladder(global_rungs(shapes(SMALL, LARGE), settings(), 4), 2, rank_max=2)
    assert len(ladder) == 4
    assert ladder.elements == (0, 16, 32, 72, 112)
    assert ladder.first_layer == (2, 0, 0, 0, 0)
    assert ladder.gain == (0.0, 1.0, 1.5, 2.5, 3.0)
    assert ladder.coverage(3) == pytest.approx(2.5 / 3)
    assert ladder.ranks(3) == {"small": 2, "large": 1}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (ImportanceReport({"small": (1.0,)}), "no gains for matrix large"),
        (ImportanceReport({"small": (float("nan"),), "large": (1.0,)}), "small must be finite"),
        (ImportanceReport({"small": (0.0,), "large": ()}), "no matrix has a rank that gains"),
    ],
)
def test_a_report_that_cannot_be_used_is_refused(report: ImportanceReport, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        global_rungs(shapes(SMALL, LARGE), settings(), 4, report)


def test_an_unknown_trainable_matrix_is_refused() -> None:
    with pytest.raises(PlanError, match="matrix other is to be trained"):
        steps(SMALL, trainable=("other",))
