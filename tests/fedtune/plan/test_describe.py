from __future__ import annotations

import json

import pytest

from fedtune.plan.describe import plan_rows
from fedtune.records import DevicePlan, DeviceProfile, FleetPlan, MatrixPlan

FIELDS = {
    "device",
    "device_class",
    "format",
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
MATRICES = (MatrixPlan("a", 3, "nf4"), MatrixPlan("b", 0, "nf4"), MatrixPlan("c", 5, "bf16"))
PLAN = FleetPlan((DevicePlan("site", MATRICES, 2, 8, 64, 5, peak_bytes=900, binding="memory"),))
PROFILE = DeviceProfile("site", "laptop", 4, 1000)


def test_a_row_has_the_fields_of_the_planned_event_as_json_values() -> None:
    (row,) = plan_rows(PLAN, [PROFILE])
    assert row.keys() == FIELDS
    assert json.loads(json.dumps(row)) == row
    assert row["ranks"] == {"a": 3, "c": 5}
    assert (row["rank_min"], row["rank_max"], row["trained_matrices"]) == (3, 5, 2)
    assert row["format"] == "bf16+nf4"
    assert (row["peak_bytes"], row["budget_bytes"]) == (900, 1000)


def test_a_device_without_a_profile_is_an_error() -> None:
    with pytest.raises(KeyError, match="site"):
        plan_rows(PLAN, [])
