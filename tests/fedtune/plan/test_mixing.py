from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import PlanError
from fedtune.plan.cost import form_bytes
from fedtune.plan.mixing import candidate_forms, may_mix
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.records import (
    BLOCK_BITS,
    DevicePlan,
    DeviceProfile,
    DistortionTable,
    FormatName,
    MatrixForm,
    MatrixShape,
    ModelShapes,
)

MB = 10**6
SIDES = {"q_proj": (256, 256), "up_proj": (512, 256), "down_proj": (256, 512)}
SHAPES = ModelShapes(
    digest="0" * 64,
    model_type="llama",
    hidden_size=256,
    intermediate_size=512,
    layers=8,
    attention_heads=8,
    vocabulary=256,
    matrices=tuple(
        MatrixShape(f"model.layers.{layer}.{name}", *side, layer)
        for layer in range(8)
        for name, side in SIDES.items()
    ),
    other_parameters=256 * 256,
)
FORMATS: tuple[FormatName, ...] = ("q8", "q4", "q3", "q2")
RUN = PlanSettings(
    rank_max=4, rank_cap=8, batch_size=4, local_steps=2, sequence_length=16, correction_rank=8
)
PLENTY = 5.1 * MB
"""Of `q4` all ranks fit, and some hundred kilobytes are left."""
_MSE = {"fp32": 0.0, "bf16": 1e-6, "int8": 4e-5, "q8": 3e-5, "q4": 0.008, "nf4": 0.0085}
_MSE |= {"q3": 0.03, "q2": 0.12}


def table(formats: tuple[FormatName, ...] = (*FORMATS, "bf16")) -> DistortionTable:
    """Later matrices lose more; each rank of a pair takes 2 % of the error away."""
    forms = candidate_forms(formats, 8)
    errors = {
        matrix.name: tuple(
            matrix.parameters
            * 1.5**matrix.layer
            * _MSE[form.format]
            * (1 - 0.02 * form.correction_rank)
            for form in forms
        )
        for matrix in SHAPES.matrices
    }
    return DistortionTable(SHAPES.digest, forms, errors)


def device(memory: float, formats: tuple[FormatName, ...] = FORMATS) -> DeviceProfile:
    return DeviceProfile(
        "d",
        "c",
        1,
        int(memory),
        matmul_flops_per_s={"fp32": 1e10},
        memory_bandwidth_bytes_per_s=1e9,
        formats=formats,
    )


def plan(
    memory: float,
    distortion: DistortionTable | None,
    run: PlanSettings = RUN,
    pins: Pins | None = None,
    formats: tuple[FormatName, ...] = FORMATS,
) -> DevicePlan:
    fixed = {} if pins is None else {"c": pins}
    profile = device(memory, formats)
    return plan_fleet([profile], SHAPES, run, pins=fixed, distortion=distortion).devices[0]


def error(found: DevicePlan, distortion: DistortionTable) -> float:
    return sum(
        distortion.errors[matrix.name][distortion.forms.index(matrix.form)]
        for matrix in found.matrices
    )


def test_leftover_bytes_widen_the_matrices_that_lose_most() -> None:
    uniform, mixed = plan(PLENTY, None), plan(PLENTY, table())
    assert {matrix.format for matrix in uniform.matrices} == {"q4"}
    widths = {m.name: BLOCK_BITS.get(m.format, 16) for m in mixed.matrices}
    of_queries = [widths[f"model.layers.{layer}.q_proj"] for layer in range(8)]
    assert of_queries == sorted(of_queries)
    assert len(set(of_queries)) > 1
    assert error(mixed, table()) < 0.7 * error(uniform, table())
    assert uniform.peak_bytes < mixed.peak_bytes <= PLENTY


def test_a_mix_changes_nothing_but_the_forms() -> None:
    uniform, mixed = plan(PLENTY, None), plan(PLENTY, table())
    assert mixed.ranks() == uniform.ranks()
    same = ("micro_batch", "checkpointing", "local_steps", "download_bytes", "upload_bytes")
    assert all(getattr(mixed, name) == getattr(uniform, name) for name in same)
    assert [m.tail_rank for m in mixed.matrices] == [m.tail_rank for m in uniform.matrices]


@settings(max_examples=40, deadline=None)
@given(
    memory=st.integers(int(1.8 * MB), 8 * MB),
    rank=st.sampled_from([0, 4, 8]),
    checkpointing=st.booleans(),
)
def test_a_mix_keeps_the_budget_and_never_loses_more_than_the_uniform_format(
    memory: int, rank: int, checkpointing: bool
) -> None:
    run = replace(RUN, correction_rank=rank, checkpointing=checkpointing)
    try:
        uniform = plan(memory, None, run)
    except PlanError:
        return
    mixed = plan(memory, table(), run)
    assert mixed.peak_bytes <= memory
    assert error(mixed, table()) <= error(uniform, table())
    assert all(matrix.correction_rank <= rank for matrix in mixed.matrices)


def test_more_memory_at_the_same_speed_never_loses_more() -> None:
    pins = Pins(rank=1, micro_batch=1, format="q2")
    run = replace(RUN, checkpointing=False)
    found = [plan(size / 10 * MB, table(), run, pins) for size in range(45, 54)]
    kept = [error(p, table()) for p in found]
    assert len(set(kept)) > 4
    assert all(more <= less for less, more in pairwise(kept))


def test_a_form_that_needs_more_workspace_does_not_keep_others_from_being_used() -> None:
    """`q8` unpacks with more indices than what is left here; `q4` pairs fit all the same."""
    tight = PLENTY - 0.35 * MB
    formats: tuple[FormatName, ...] = ("q4", "q3", "q2")
    with_q8 = plan(tight, table(), formats=(*formats, "q8"))
    without = plan(tight, table(), formats=formats)
    assert {m.format for m in plan(tight, None).matrices} == {"q4"}
    assert error(with_q8, table()) <= error(without, table()) < error(plan(tight, None), table())


def test_only_formats_that_the_device_supports_are_mixed() -> None:
    mixed = plan(PLENTY, table(), formats=("q4", "q2"))
    assert {matrix.format for matrix in mixed.matrices} <= {"q4", "q2"}


def test_a_device_of_one_format_gets_pairs_where_they_repair_most() -> None:
    mixed = plan(PLENTY, table(), formats=("q4",))
    ranks = {m.name: m.correction_rank for m in mixed.matrices}
    assert {m.format for m in mixed.matrices} == {"q4"}
    assert set(ranks.values()) <= {0, 4, 8}
    assert max(ranks.values()) == 8
    assert mixed.peak_bytes <= PLENTY


def test_a_pinned_format_is_not_widened_but_may_be_repaired() -> None:
    mixed = plan(PLENTY, table(), pins=Pins(format="q2"))
    assert {m.format for m in mixed.matrices} == {"q2"}
    assert max(m.correction_rank for m in mixed.matrices) == 8


def test_a_pinned_correction_is_counted_and_kept() -> None:
    bare = plan(20 * MB, None, pins=Pins(format="q4"))
    pinned = plan(20 * MB, None, pins=Pins(format="q4", correction_rank=4))
    assert {m.correction_rank for m in pinned.matrices} == {4}
    sides = sum(m.out_features + m.in_features for m in SHAPES.matrices)
    assert pinned.micro_batch == bare.micro_batch
    assert pinned.peak_bytes - bare.peak_bytes == 6 * 4 * sides
    mixed = plan(PLENTY, table(), pins=Pins(correction_rank=4))
    assert {m.correction_rank for m in mixed.matrices if m.format in ("q4", "q3", "q2")} <= {4}
    none = plan(PLENTY, table(), pins=Pins(correction_rank=0))
    assert {m.correction_rank for m in none.matrices} == {0}


def test_formats_that_lose_little_are_not_mixed() -> None:
    for name in ("fp32", "bf16", "q8", "int8"):
        formats: tuple[FormatName, ...] = (name, "q2")
        found = plan(40 * MB, table((*formats, "q4")), formats=formats)
        assert {m.form for m in found.matrices} == {MatrixForm(name, 64 if name == "q8" else 0)}


def test_a_format_that_was_not_measured_is_not_mixed() -> None:
    found = plan(PLENTY, table(("q2", "q3")), formats=("nf4", "q2"))
    assert {m.form for m in found.matrices} == {MatrixForm("nf4", 64)}


def test_a_round_too_short_for_wider_matrices_keeps_the_uniform_ones() -> None:
    slow = replace(device(PLENTY), memory_bandwidth_bytes_per_s=1e6, matmul_flops_per_s={})
    run = replace(RUN, local_steps=1)  # more steps could be had for less rank
    uniform = plan_fleet([slow], SHAPES, run).devices[0]
    tight = replace(run, round_seconds=uniform.seconds * 1.001)
    assert {
        m.format for m in plan_fleet([slow], SHAPES, tight, distortion=table()).devices[0].matrices
    } == {"q4"}


def test_equal_input_gives_equal_plans() -> None:
    assert plan(PLENTY, table()) == plan(PLENTY, table())


def test_a_table_can_only_change_plans_of_few_bits() -> None:
    assert may_mix(plan_fleet([device(PLENTY)], SHAPES, RUN))
    assert not may_mix(plan_fleet([device(40 * MB)], SHAPES, RUN))


def test_candidates_are_our_formats_and_pairs_for_those_of_few_bits() -> None:
    forms = candidate_forms(("q2", "q8", "int8", "bnb-nf4", "fp32", "q2"), 8)
    assert Counter(form.format for form in forms) == {"q2": 3, "q8": 1, "int8": 1, "fp32": 1}
    assert {form.correction_rank for form in forms} == {0, 4, 8}
    assert {form.correction_rank for form in candidate_forms(("q2",), 0)} == {0}


def test_candidates_differ_in_bytes() -> None:
    matrix = SHAPES.matrices[0]
    sizes = [form_bytes(matrix, form) for form in candidate_forms(FORMATS, 0)]
    assert len(set(sizes)) == len(FORMATS)


def test_a_table_of_another_base_is_refused() -> None:
    with pytest.raises(PlanError, match=r"is of base abc, and the run's base is 0{12}; measure"):
        plan(PLENTY, replace(table(), base_digest="abc"))


def test_a_table_that_lacks_a_matrix_is_refused() -> None:
    whole = table()
    errors = {name: row for name, row in whole.errors.items() if "layers.3.q" not in name}
    with pytest.raises(PlanError, match=r"lacks model\.layers\.3\.q_proj; measure again"):
        plan(PLENTY, replace(whole, errors=errors))
