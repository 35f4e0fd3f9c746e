"""The predicted peak against the allocations of a real round on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedtune.aggregate.rules import make_rule
from fedtune.model.shapes import read_shapes
from fedtune.plan.cost import Load, backbone_bytes, peak_bytes
from fedtune.records import DevicePlan, FormatName, MatrixForm, MatrixPlan
from fedtune.wire.messages import OptimizerSpec

torch = pytest.importorskip("torch")


@dataclass(frozen=True)
class Sample:
    tokens: np.ndarray
    loss_mask: np.ndarray
    label: int = 0


def measured_peak(run: Callable[[], object]) -> int:
    """Most bytes that tensors hold at once beyond those that were there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


@pytest.mark.parametrize(
    ("format_name", "micro_batch", "checkpointing", "rank", "first"),
    [
        ("fp32", 1, False, 4, 0),
        ("nf4", 4, False, 16, 0),
        ("int8", 4, False, 4, 3),
        ("q3", 1, False, 4, 0),
        ("fp32", 2, True, 16, 0),
    ],
)
def test_the_predicted_peak_covers_the_measured_one_within_a_quarter(
    stories260k: Path,
    format_name: FormatName,
    micro_batch: int,
    checkpointing: bool,
    rank: int,
    first: int,
) -> None:
    from fedtune.model.backbone import BackboneShelf
    from fedtune.train.round import train_round

    shapes = read_shapes(stories260k, ("all-linear",))
    matrices = tuple(
        MatrixPlan(m.name, rank if m.layer >= first else 0, format_name) for m in shapes.matrices
    )
    plan = DevicePlan("d", matrices, micro_batch, 4, 64, 2, checkpointing, first)
    forms = {m.name: MatrixForm(format_name) for m in shapes.matrices}
    rule = make_rule("delta", 32)
    sent = rule.dispatch(
        rule.start(shapes.matrices, {}), plan, scale=1.0, rng=np.random.default_rng(0)
    )
    rng = np.random.default_rng(0)
    batch = [
        Sample(rng.integers(0, shapes.vocabulary, 64).astype(np.int32), np.ones(64, np.bool_))
        for _ in range(4)
    ]
    shelf = BackboneShelf(stories260k, torch.device("cpu"), keep_base=False)
    backbone = shelf.get("causal-lm", (), forms)
    measured = measured_peak(
        lambda: train_round(
            backbone, [batch, batch], sent, plan, OptimizerSpec(), task="causal-lm", pad_id=0
        )
    )
    by_name = shapes.by_name()
    load = Load(
        micro_batch,
        64,
        checkpointing,
        first,
        sum(
            m.rank * (by_name[m.name].out_features + by_name[m.name].in_features) for m in matrices
        ),
        sum(m.rank for m in matrices),
    )
    peak = peak_bytes(shapes, forms, load)
    predicted = peak.total - peak.backbone - peak.other
    assert backbone.packed_bytes == backbone_bytes(shapes, forms)
    assert measured <= predicted <= 1.25 * measured
