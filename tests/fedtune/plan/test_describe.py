from __future__ import annotations

import json

import pytest

from fedtune.plan.describe import plan_rows
from fedtune.records import (
    DevicePlan,
    DeviceProfile,
    FleetPlan,
    MatrixPlan,
    MatrixShape,
    ModelShapes,
)

FIELDS = {
    "device",
    "device_class",
    "format",
    "bits",
    "forms",
    "ranks",
    "rank_min",
    "rank_max",
    "trained_matrices",
    "tail_rank_max",
    "local_steps",
    "micro_batch",
    "batch_size",
    "sequence_length",
    "checkpointing",
    "peak_bytes",
    "budget_bytes",
    "seconds",
    "download_bytes",
    "upload_bytes",
    "binding",
}
MATRICES = (
    MatrixPlan("a", 3, "nf4", block_size=64),
    MatrixPlan("b", 0, "nf4", block_size=64, correction_rank=4),
    MatrixPlan("c", 5, "bf16"),
)
PLAN = FleetPlan((DevicePlan("site", MATRICES, 2, 8, 64, 5, peak_bytes=900, binding="memory"),))
PROFILE = DeviceProfile("site", "laptop", 4, 1000)
SHAPES = ModelShapes(
    "0", "llama", 64, 64, 1, 4, 100, tuple(MatrixShape(n, 64, 64, 0) for n in "abc"), 0
)


def test_a_row_has_the_fields_of_the_planned_event_as_json_values() -> None:
    (row,) = plan_rows(PLAN, [PROFILE], SHAPES)
    assert row.keys() == FIELDS
    assert json.loads(json.dumps(row)) == row
    assert row["ranks"] == {"a": 3, "c": 5}
    assert (row["rank_min"], row["rank_max"], row["trained_matrices"]) == (3, 5, 2)
    assert row["forms"] == {"a": "nf4/64", "b": "nf4/64+4", "c": "bf16"}
    assert (row["peak_bytes"], row["budget_bytes"]) == (900, 1000)


def test_a_mix_is_named_by_its_range_and_its_mean_bits() -> None:
    (row,) = plan_rows(PLAN, [PROFILE], SHAPES)
    nf4 = 64 * 64 // 2 + 64 + 4 + 4
    pair = 2 * 4 * (64 + 64)
    bits = 8 * (2 * nf4 + pair + 2 * 64 * 64) / (3 * 64 * 64)
    assert row["bits"] == pytest.approx(bits, abs=1e-3)
    assert row["format"] == f"nf4-bf16 mixed, {bits:.1f} bits"


def test_a_uniform_backbone_is_named_by_its_format() -> None:
    uniform = FleetPlan((DevicePlan("site", MATRICES[:2], 2, 8, 64, 5),))
    assert plan_rows(uniform, [PROFILE], SHAPES)[0]["format"] == "nf4"


def test_a_device_without_a_profile_is_an_error() -> None:
    with pytest.raises(KeyError, match="site"):
        plan_rows(PLAN, [], SHAPES)
