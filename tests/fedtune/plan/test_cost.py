from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.plan.cost import (
    Load,
    activation_bytes,
    adapter_bytes,
    backbone_bytes,
    block_activation_bytes,
    block_passes,
    correction_elements,
    download_bytes,
    head_bytes,
    load_of_plan,
    loading_bytes,
    logit_rows,
    matrix_bytes,
    message_bytes,
    moved_bytes,
    optimiser_bytes,
    pair_bytes,
    peak_bytes,
    step_flops,
    step_seconds,
    touched_bytes,
    transfer_seconds,
    transient_bytes,
    upload_bytes,
    workspace_bytes,
)
from fedtune.plan.traffic import WireCosts
from fedtune.records import (
    BACKBONE_FORMATS,
    DevicePlan,
    DeviceProfile,
    FormatName,
    MatrixForm,
    MatrixPlan,
    MatrixShape,
    ModelShapes,
)

MATRICES = (MatrixShape("a", 64, 128, 0), MatrixShape("b", 256, 64, 1))
SHAPES = ModelShapes("0", "llama", 64, 128, 2, 4, 100, MATRICES, 64 * 100)
LOAD = Load(
    micro_batch=2,
    sequence_length=16,
    trained_elements=1000,
    trained_ranks=6,
    tail_elements=300,
    tail_ranks=2,
)


def all_in(format_name: FormatName) -> dict[str, MatrixForm]:
    return {matrix.name: MatrixForm(format_name) for matrix in MATRICES}


def profile(**changes: object) -> DeviceProfile:
    values: dict[str, object] = {
        "name": "d",
        "device_class": "c",
        "cpu_threads": 1,
        "memory_bytes": 1,
        "matmul_flops_per_s": {"fp32": 1e9},
        "memory_bandwidth_bytes_per_s": 1e8,
        "link_bytes_per_s": 1e4,
    }
    return DeviceProfile(**(values | changes))  # type: ignore[arg-type]


def test_packed_bytes_by_format() -> None:
    matrix = MatrixShape("w", 4096, 4096, 0)
    parameters = 4096 * 4096
    assert matrix_bytes(matrix, "fp32") == 4 * parameters
    assert matrix_bytes(matrix, "bf16") == 2 * parameters
    assert matrix_bytes(matrix, "fp16") == 2 * parameters
    assert matrix_bytes(matrix, "int8") == parameters + 4 * 4096
    assert matrix_bytes(matrix, "bnb-nf4") * 8 / parameters == 4 + 8 / 64 + 32 / (64 * 256)
    for name, bits in (("q8", 8), ("q4", 4), ("nf4", 4), ("q3", 3), ("q2", 2)):
        # Beside what bitsandbytes keeps there is the float32 offset of the scales.
        without_offset = matrix_bytes(matrix, name) - 4
        assert without_offset * 8 / parameters == bits + 8 / 64 + 32 / (64 * 256)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_smaller_blocks_cost_a_scale_each(block: int) -> None:
    matrix = MatrixShape("w", 4096, 4096, 0)
    bits = (matrix_bytes(matrix, "q3", block) - 4) * 8 / matrix.parameters
    assert bits == 3 + 8 / block + 32 / (block * 256)


def test_a_small_block_matrix_is_padded_to_256_weights() -> None:
    assert matrix_bytes(MatrixShape("w", 3, 33, 0), "nf4") == 128 + 4 + 4 + 4
    assert matrix_bytes(MatrixShape("w", 3, 33, 0), "bnb-nf4") == 50 + 2 + 4


def test_formats_may_differ_between_matrices() -> None:
    mixed = {"a": MatrixForm("fp32"), "b": MatrixForm("bf16")}
    assert backbone_bytes(SHAPES, mixed) == 4 * 64 * 128 + 2 * 256 * 64


def test_a_trained_number_takes_16_bytes_and_a_frozen_one_4() -> None:
    assert adapter_bytes(LOAD) == 4 * 1300
    assert optimiser_bytes(LOAD) == 12 * 1000
    whole = replace(LOAD, dense_parameters=10)
    assert adapter_bytes(whole) + optimiser_bytes(whole) == 16 * 1010 + 4 * 300
    kept = replace(whole, keeps_start=True)
    assert adapter_bytes(kept) + optimiser_bytes(kept) == 20 * 1010 + 4 * 300


def test_a_message_lies_in_memory_as_it_came_and_as_float32() -> None:
    assert message_bytes(LOAD, WireCosts()) == 4 * 1300
    assert message_bytes(LOAD, WireCosts(down=2)) == (2 + 4) * 1300
    assert message_bytes(LOAD, WireCosts(feedback=True)) == 4 * (1300 + 2 * 1000)


def llama(**changes: object) -> ModelShapes:
    """Two blocks whose matrices have Llama's names: 64 hidden, keys half as wide as queries."""
    sizes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    matrices = tuple(
        MatrixShape(f"model.layers.{layer}.{name}", *size, layer)
        for layer in range(2)
        for name, size in sizes.items()
    )
    shapes = ModelShapes("0", "llama", 64, 128, 2, 4, 100, matrices, 64 * 100)
    return replace(shapes, **changes)  # type: ignore[arg-type]


FUSED_NUMBERS = 2 * (64 + 1) + 2 * 64 + 2 * 32 + 4 + 2 * 128
"""Norms' inputs, q and the result, k and v, heads, gate and up."""


def test_a_fused_block_keeps_no_norms_results_and_no_product_of_gate_and_up() -> None:
    assert block_activation_bytes(llama(), LOAD) == 4 * 32 * FUSED_NUMBERS


def test_activations_have_the_size_of_the_products_numbers() -> None:
    half = replace(LOAD, itemsize=2)
    assert block_activation_bytes(llama(), half) * 2 == block_activation_bytes(llama(), LOAD)
    assert peak_bytes(llama(), _forms(llama()), half).other == 2 * 6400
    assert adapter_bytes(half) == adapter_bytes(LOAD)


def test_a_models_own_blocks_keep_norms_results_and_what_leaves_the_activation() -> None:
    own = llama(model_type="granite")
    assert block_activation_bytes(own, LOAD) == 4 * 32 * (FUSED_NUMBERS + 2 * 64 + 2 * 128)


def test_matrices_that_are_not_adapted_keep_no_input() -> None:
    few = llama(matrices=tuple(m for m in llama().matrices if m.name.endswith("q_proj")))
    # The keys' width is not known, the norm in front of the queries has a result.
    numbers = 2 * (64 + 1) + 4 * 64 + 4 + 64 + 3 * 128
    assert block_activation_bytes(few, LOAD) == 4 * 32 * numbers


def test_padded_batches_repeat_shared_heads_and_keep_the_norms_result() -> None:
    padded = replace(LOAD, task="sequence-classification")
    assert block_activation_bytes(llama(), padded) == 4 * 32 * (FUSED_NUMBERS + 2 * 32 + 64)


def test_a_block_without_a_gate_keeps_two_intermediate_and_five_if_it_goes_by_steps() -> None:
    numbers = 2 * (64 + 1) + 4 * 64 + 4 + 2 * 64
    bert, gpt2 = (replace(SHAPES, model_type=kind) for kind in ("bert", "gpt2"))
    assert block_activation_bytes(bert, LOAD) == 4 * 32 * (numbers + 2 * 128)
    assert block_activation_bytes(gpt2, LOAD) == 4 * 32 * (numbers + 5 * 128)


def test_eager_attention_keeps_scores_and_probabilities() -> None:
    eager = replace(LOAD, task="sequence-classification", eager_attention=True)
    fused = replace(eager, eager_attention=False)
    more = block_activation_bytes(SHAPES, eager) - block_activation_bytes(SHAPES, fused)
    assert more == 2 * 4 * (2 * 4 * 16 * 16)


ENDS = 32 * (4 * 64 + 64)
"""The input of the last norm, and the batch."""


def test_activations_are_kept_from_the_first_trained_layer_up() -> None:
    adapters = 4 * (32 * 8 + 1300)
    block = block_activation_bytes(SHAPES, LOAD)
    assert activation_bytes(SHAPES, LOAD) == 2 * block + adapters + ENDS
    top = replace(LOAD, first_trained_layer=1)
    assert activation_bytes(SHAPES, top) == block + adapters + ENDS


def test_checkpointing_keeps_only_the_input_of_each_block_and_the_stacked_factors() -> None:
    load = replace(LOAD, checkpointing=True)
    assert activation_bytes(SHAPES, load) == 2 * 4 * 32 * 64 + 4 * 1300 + ENDS
    # The block's own activations come back while its gradients are computed.
    again = block_activation_bytes(SHAPES, LOAD) - 4 * 32 * 64
    assert transient_bytes(SHAPES, load) >= again


def test_the_head_has_a_chunk_of_logits_and_only_in_language_modelling() -> None:
    assert head_bytes(SHAPES, LOAD) == 4 * 32 * (100 + 2 * 64)
    assert head_bytes(SHAPES, replace(LOAD, task="sequence-classification")) == 0
    wide, long = replace(SHAPES, vocabulary=128_000), replace(LOAD, micro_batch=1000)
    chunk = logit_rows(128_000, 4, accelerator=False)
    assert chunk == 128
    assert head_bytes(wide, long) == 4 * chunk * 128_000 + 2 * 4 * 16_000 * 64


def test_a_cpu_takes_the_loss_of_narrow_logits_in_float32() -> None:
    half = replace(LOAD, itemsize=2)
    assert head_bytes(SHAPES, half) == 32 * (6 * 100 + 2 * 2 * 64)
    assert head_bytes(SHAPES, replace(half, whole_matrices=True)) == 32 * (2 * 100 + 2 * 2 * 64)


def test_the_head_and_a_blocks_gradients_take_turns() -> None:
    few = transient_bytes(llama(), LOAD)
    many = transient_bytes(llama(vocabulary=10_000), LOAD)
    assert few == 4 * 32 * (2 * 64 + 5 * 128)
    assert many == 4 * 32 * (10_000 + 2 * 64)
    on_gpu = replace(LOAD, itemsize=2, whole_matrices=True)
    assert transient_bytes(llama(), on_gpu) == 2 * 32 * (2 * 64 + 2 * 128)
    assert transient_bytes(replace(SHAPES, model_type="bert"), LOAD) == 4 * 32 * (2 * 64 + 128)


def test_the_workspace_is_the_largest_unpacked_panel_in_float32_with_its_indices() -> None:
    assert (
        workspace_bytes(SHAPES, {"a": MatrixForm("int8"), "b": MatrixForm("fp32")}) == 4 * 64 * 128
    )
    assert workspace_bytes(SHAPES, all_in("bf16")) == 4 * 256 * 64
    assert workspace_bytes(SHAPES, all_in("fp32")) == 0
    for name, index_bits in (("q8", 16), ("q4", 16), ("nf4", 16), ("q3", 12), ("q2", 8)):
        assert workspace_bytes(SHAPES, all_in(name)) == (4 + index_bits / 8) * 256 * 64


def test_a_narrow_panel_is_unpacked_by_way_of_float32() -> None:
    assert workspace_bytes(SHAPES, all_in("fp32"), itemsize=2) == 2 * 256 * 64
    assert workspace_bytes(SHAPES, all_in("int8"), itemsize=2) == 2 * 256 * 64
    assert workspace_bytes(SHAPES, all_in("q4"), itemsize=2) == (2 + 4 + 2) * 256 * 64


def test_a_panel_has_a_million_weights_except_on_an_accelerator_and_in_bitsandbytes() -> None:
    tall = replace(SHAPES, matrices=(MatrixShape("a", 10_000, 4096, 0),))
    every = 10_000 * 4096
    assert workspace_bytes(tall, {"a": MatrixForm("int8")}) == 4 * 256 * 4096
    assert workspace_bytes(tall, {"a": MatrixForm("bnb-int8")}) == 4 * every
    assert workspace_bytes(tall, {"a": MatrixForm("int8")}, whole_matrices=True) == 4 * every
    assert workspace_bytes(tall, {"a": MatrixForm("q4")}, whole_matrices=True) == 4 * every


def test_an_accelerator_keeps_a_recomputed_block_dense() -> None:
    load = replace(LOAD, itemsize=2, whole_matrices=True, checkpointing=True)
    peak = peak_bytes(llama(), _forms(llama()), load)
    assert peak.workspace == 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 128 * 64)


def _forms(shapes: ModelShapes) -> dict[str, MatrixForm]:
    return {matrix.name: MatrixForm("nf4") for matrix in shapes.matrices}


def test_the_peak_is_the_sum_of_its_parts_and_names_the_largest() -> None:
    peak = peak_bytes(SHAPES, all_in("nf4"), LOAD)
    parts = (
        backbone_bytes(SHAPES, all_in("nf4")),
        0,
        4 * 6400,
        adapter_bytes(LOAD),
        optimiser_bytes(LOAD),
        activation_bytes(SHAPES, LOAD),
        transient_bytes(SHAPES, LOAD),
        workspace_bytes(SHAPES, all_in("nf4")),
    )
    assert peak.total == sum(parts)
    assert peak.largest() == ("activations", max(parts))


def test_our_own_formats_are_ordered_by_bytes() -> None:
    matrix = MatrixShape("w", 4096, 4096, 0)
    own = [name for name in BACKBONE_FORMATS if not name.startswith("bnb-")]
    sizes = [matrix_bytes(matrix, name) for name in own]
    assert sizes == sorted(sizes, reverse=True)
    assert BACKBONE_FORMATS[len(own) :] == ("bnb-int8", "bnb-nf4")


def test_a_correction_is_its_pair_and_a_copy_in_float32() -> None:
    pair = MatrixForm("q2", 64, 4)
    assert correction_elements(MATRICES[0], pair) == 4 * (64 + 128)
    assert pair_bytes(MATRICES[0], pair) == 6 * 4 * (64 + 128)
    assert correction_elements(MATRICES[0], MatrixForm("q2", 64, 100)) == 64 * (64 + 128)
    more = peak_bytes(SHAPES, all_in("q2"), replace(LOAD, correction_elements=10))
    assert more.correction == 60
    assert more.total == peak_bytes(SHAPES, all_in("q2"), LOAD).total + 60


def test_fitting_takes_less_per_weight_where_singular_values_are_not_exact() -> None:
    large = replace(SHAPES, matrices=(MatrixShape("a", 600, 1000, 0),))
    assert loading_bytes(large, {"a": MatrixForm("q2", 64, 4)}) == 18 * 600_000
    assert loading_bytes(large, {"a": MatrixForm("q2")}) == 24 * (1 << 18) + 300_000
    assert loading_bytes(large, {"a": MatrixForm("bf16")}) == 0


def test_a_plan_has_the_load_of_its_matrices() -> None:
    plan = DevicePlan(
        "d",
        (MatrixPlan("a", 2, "q2", 3, 64, 4), MatrixPlan("b", 0, "fp32", 1)),
        micro_batch=2,
        batch_size=8,
        sequence_length=16,
        local_steps=1,
        checkpointing=True,
        first_trained_layer=1,
    )
    assert load_of_plan(plan, SHAPES, dense_parameters=5, itemsize=2) == Load(
        micro_batch=2,
        sequence_length=16,
        checkpointing=True,
        first_trained_layer=1,
        trained_elements=2 * 192,
        trained_ranks=2,
        tail_elements=3 * 192 + 320,
        tail_ranks=4,
        correction_elements=4 * 192,
        dense_parameters=5,
        itemsize=2,
    )


def test_step_flops_by_hand() -> None:
    load = Load(micro_batch=1, sequence_length=16, first_trained_layer=1, trained_elements=1000)
    tokens, p, above = 8 * 16, 64 * 128 + 256 * 64, 256 * 64
    attention = 4 * tokens * 16 * 64  # one block, forward
    expected = 2 * p * tokens + 2 * attention  # forward
    expected += 2 * above * tokens + 2 * attention  # backward of one block
    expected += 2 * 2 * tokens * 64 * 100  # head, both ways
    expected += 6 * tokens * 1000
    assert step_flops(SHAPES, load, batch_size=8) == expected
    recomputed = 2 * above * tokens + attention
    again = step_flops(SHAPES, replace(load, checkpointing=True), batch_size=8)
    assert again == expected + recomputed


def test_matrices_that_may_not_be_adapted_are_computed_with_all_the_same() -> None:
    load = Load(micro_batch=1, sequence_length=16)
    one = replace(
        SHAPES, matrices=MATRICES[:1], other_parameters=SHAPES.other_parameters + 256 * 64
    )
    assert step_flops(one, load, 8) == step_flops(SHAPES, load, 8)


def test_weights_move_once_per_pass_and_micro_batch() -> None:
    once = 4 * (64 * 128 + 256 * 64)
    load = Load(micro_batch=2, sequence_length=16)
    assert moved_bytes(SHAPES, all_in("fp32"), load, 8) == 4 * 2 * once
    recomputing = replace(load, checkpointing=True)
    assert moved_bytes(SHAPES, all_in("fp32"), recomputing, 8) == 4 * 3 * once
    top = replace(load, first_trained_layer=1)
    assert moved_bytes(SHAPES, all_in("fp32"), top, 8) == 4 * 4 * (64 * 128 + 2 * 256 * 64)
    packed = backbone_bytes(SHAPES, all_in("nf4")) + 2 * once
    assert moved_bytes(SHAPES, all_in("nf4"), load, 8) == 4 * 2 * packed


def test_a_matrix_that_is_held_in_another_dtype_is_converted_in_every_pass() -> None:
    load = Load(micro_batch=8, sequence_length=16, itemsize=2)
    weights = 64 * 128 + 256 * 64
    assert moved_bytes(SHAPES, all_in("fp32"), load, 8) == 2 * (4 + 2 * 2) * weights


def test_products_of_two_byte_numbers_go_at_their_own_rate() -> None:
    fast = profile(matmul_flops_per_s={"fp32": 1e9, "bf16": 4e9}, memory_bandwidth_bytes_per_s=0.0)
    full = step_seconds(fast, SHAPES, all_in("nf4"), LOAD, 8)
    half = step_seconds(fast, SHAPES, all_in("nf4"), replace(LOAD, itemsize=2), 8)
    assert half == pytest.approx(full / 4)


def test_seconds_are_arithmetic_plus_traffic() -> None:
    formats = all_in("nf4")
    moved = moved_bytes(SHAPES, formats, LOAD, 8) + touched_bytes(SHAPES, LOAD, 8)
    expected = step_flops(SHAPES, LOAD, 8) / 1e9 + moved / 1e8
    assert step_seconds(profile(), SHAPES, formats, LOAD, 8) == pytest.approx(expected)
    unknown = profile(matmul_flops_per_s={}, memory_bandwidth_bytes_per_s=0.0)
    assert step_seconds(unknown, SHAPES, formats, LOAD, 8) == 0.0
    # Two blocks, forward and twice that backward, in four micro-batches.
    called = step_seconds(unknown, SHAPES, formats, LOAD, 8, block_seconds=0.5)
    assert called == 0.5 * 2 * 3 * 4


def test_logits_and_activations_are_touched_number_by_number() -> None:
    numbers = block_activation_bytes(SHAPES, LOAD) / (4 * 32)
    expected = 25 * 128 * 100 + 34 * 128 * numbers * 6
    assert touched_bytes(SHAPES, LOAD, 8) == expected
    classified = replace(LOAD, task="sequence-classification")
    assert touched_bytes(SHAPES, classified, 8) < expected - 25 * 128 * 100 * 0.99
    on_gpu = replace(LOAD, itemsize=2, whole_matrices=True)
    assert touched_bytes(SHAPES, on_gpu, 8) == 10 * 128 * 100 + 6 * 128 * numbers * 6


def test_a_step_passes_through_each_block_three_times_and_once_more_when_it_recomputes() -> None:
    assert block_passes(SHAPES, LOAD) == 2 * 3
    assert block_passes(SHAPES, replace(LOAD, checkpointing=True)) == 2 * 4
    assert block_passes(SHAPES, replace(LOAD, first_trained_layer=1)) == 2 + 2


def test_samples_that_are_short_on_average_take_the_seconds_of_short_ones() -> None:
    forms = all_in("nf4")
    whole = step_seconds(profile(), SHAPES, forms, LOAD, 8)
    short = step_seconds(profile(), SHAPES, forms, replace(LOAD, sequence_length=4), 8)
    assert step_seconds(profile(), SHAPES, forms, LOAD, 8, sample_tokens=4.2) == short < whole
    assert step_seconds(profile(), SHAPES, forms, LOAD, 8, sample_tokens=40.0) == whole


def test_an_output_matrix_of_its_own_is_computed_with_once() -> None:
    tied, own = llama(), llama(other_parameters=2 * 64 * 100)
    assert step_flops(tied, LOAD, 8) == step_flops(own, LOAD, 8)


def test_the_tail_is_downloaded_and_never_uploaded() -> None:
    load = replace(LOAD, dense_parameters=10)
    wire = WireCosts(down=2, up=0.53, header_bytes=7)
    assert download_bytes(load, wire) == 7 + 2 * (1000 + 300 + 10)
    assert upload_bytes(load, wire) == 7 + 536
    assert transfer_seconds(profile(), load, wire) == pytest.approx((14 + 2620 + 536) / 1e4)
    assert transfer_seconds(profile(link_bytes_per_s=0.0), load, wire) == 0.0
