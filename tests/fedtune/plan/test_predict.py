"""A finished plan read back by the cost model: the same numbers as the planner's own."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from fedtune.plan.cost import PeakBytes
from fedtune.plan.predict import PARTS, memory_parts, predict
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.records import CostCalibration, DeviceProfile, MatrixShape, ModelShapes

SHAPES = ModelShapes(
    digest="d" * 64,
    model_type="llama",
    hidden_size=64,
    intermediate_size=172,
    layers=3,
    attention_heads=4,
    vocabulary=512,
    matrices=tuple(
        MatrixShape(f"model.layers.{layer}.mlp.{name}", out, into, layer)
        for layer in range(3)
        for name, out, into in (("up_proj", 172, 64), ("down_proj", 64, 172))
    ),
    other_parameters=40_000,
)
SETTINGS = PlanSettings(
    rank_max=8, rank_cap=12, batch_size=8, local_steps=3, sequence_length=32, tail=True
)
RATES = {"matmul_flops_per_s": {"fp32": 1e9}, "memory_bandwidth_bytes_per_s": 1e9}


def device(memory: int, **fields: object) -> DeviceProfile:
    known = {"formats": ("fp32", "nf4"), "link_bytes_per_s": 1e6, **RATES, **fields}
    return DeviceProfile("a", "any", 1, memory, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", [1_200_000, 1_700_000, 2_500_000, 50_000_000])
@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("formats", [("fp32", "nf4"), ("nf4",)])
def test_a_plan_read_back_costs_what_the_planner_wrote(
    memory: int, accelerator: str, formats: tuple[str, ...]
) -> None:
    given = {"accelerator": accelerator, "accelerator_memory_bytes": memory * 2}
    profile = device(memory * 2, formats=formats, **given)
    (plan,) = plan_fleet([profile], SHAPES, SETTINGS).devices
    found = predict(plan, profile, SHAPES, SETTINGS)
    assert found.peak_bytes == plan.peak_bytes
    assert found.seconds == pytest.approx(plan.seconds)
    assert (found.download_bytes, found.upload_bytes) == (plan.download_bytes, plan.upload_bytes)


def test_corrections_and_a_whole_tail_are_read_back_too() -> None:
    settings = replace(SETTINGS, whole_tail=True, rank_cap=4096, dense_parameters=700)
    pins = {"any": Pins(format="nf4", correction_rank=4)}
    (plan,) = plan_fleet([device(50_000_000)], SHAPES, settings, pins=pins).devices
    found = predict(plan, device(50_000_000), SHAPES, settings)
    assert found.parts["correction"] > 0
    assert found.peak_bytes == plan.peak_bytes


def test_a_kept_start_takes_four_bytes_for_each_number_that_trains() -> None:
    profile, kept = device(50_000_000), replace(SETTINGS, keeps_start=True)
    (plan,) = plan_fleet([profile], SHAPES, kept).devices
    found, plain = (predict(plan, profile, SHAPES, settings) for settings in (kept, SETTINGS))
    assert found.peak_bytes == plan.peak_bytes
    sides = {m.name: m.out_features + m.in_features for m in SHAPES.matrices}
    elements = sum(rank * sides[name] for name, rank in plan.ranks().items())
    assert found.peak_bytes - plain.peak_bytes == 4 * elements > 0


def test_every_byte_of_the_peak_is_in_one_part() -> None:
    names = [field.name for field in fields(PeakBytes)]
    peak = PeakBytes(**{name: 10**place for place, name in enumerate(names)})
    parts = memory_parts(peak)
    assert sum(parts.values()) == peak.total
    assert set(parts) <= set(PARTS)
    assert "other" not in parts, "a field of PeakBytes has no name that a person reads"


def test_a_calibration_scales_steps_and_memory_but_no_transfer() -> None:
    profile = device(50_000_000)
    (plan,) = plan_fleet([profile], SHAPES, SETTINGS).devices
    plain = predict(plan, profile, SHAPES, SETTINGS)
    found = predict(plan, profile, SHAPES, SETTINGS, CostCalibration(2.0, 1.5))
    assert found.compute_seconds == pytest.approx(2 * plain.compute_seconds)
    assert found.transfer_seconds == plain.transfer_seconds
    assert found.peak_bytes == math.ceil(1.5 * plain.peak_bytes)
    odd = predict(plan, profile, SHAPES, SETTINGS, CostCalibration(1.0, 1.2345678))
    assert odd.peak_bytes == math.ceil(1.2345678 * plain.peak_bytes)
