from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.plan.cost import (
    Load,
    activation_bytes,
    adapter_bytes,
    backbone_bytes,
    block_activation_bytes,
    correction_elements,
    download_bytes,
    logits_bytes,
    matrix_bytes,
    moved_bytes,
    pair_bytes,
    peak_bytes,
    step_flops,
    step_seconds,
    transfer_seconds,
    transient_bytes,
    upload_bytes,
    workspace_bytes,
)
from fedtune.records import (
    BACKBONE_FORMATS,
    DeviceProfile,
    FormatName,
    MatrixForm,
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
    assert adapter_bytes(LOAD) == 16 * 1000 + 4 * 300
    assert adapter_bytes(replace(LOAD, dense_parameters=10)) == 16 * 1010 + 4 * 300


def test_a_block_keeps_nine_hidden_and_four_intermediate_per_token() -> None:
    assert block_activation_bytes(SHAPES, LOAD) == 4 * 32 * (9 * 64 + 4 * 128)


def test_a_block_without_a_gate_keeps_two_intermediate() -> None:
    bert = replace(SHAPES, model_type="bert")
    assert block_activation_bytes(bert, LOAD) == 4 * 32 * (9 * 64 + 2 * 128)


def test_eager_attention_keeps_scores_and_probabilities() -> None:
    more = block_activation_bytes(SHAPES, replace(LOAD, eager_attention=True))
    assert more - block_activation_bytes(SHAPES, LOAD) == 2 * 4 * (2 * 4 * 16 * 16)


def test_activations_are_kept_from_the_first_trained_layer_up() -> None:
    adapters = 4 * (32 * 8 + 1300)
    block = block_activation_bytes(SHAPES, LOAD)
    assert activation_bytes(SHAPES, LOAD) == 2 * block + adapters
    top = replace(LOAD, first_trained_layer=1)
    assert activation_bytes(SHAPES, top) == block + adapters


def test_checkpointing_keeps_only_the_input_of_each_block() -> None:
    load = replace(LOAD, checkpointing=True)
    assert activation_bytes(SHAPES, load) == 2 * 4 * 32 * 64
    # The block's own activations come back while its gradients are computed.
    assert transient_bytes(SHAPES, load) >= block_activation_bytes(SHAPES, LOAD)


def test_logits_have_three_copies_and_only_in_language_modelling() -> None:
    assert logits_bytes(SHAPES, LOAD) == 3 * 4 * 32 * 100
    assert logits_bytes(SHAPES, replace(LOAD, task="sequence-classification")) == 0


def test_logits_and_a_blocks_gradients_take_turns() -> None:
    few = transient_bytes(SHAPES, LOAD)
    many = transient_bytes(replace(SHAPES, vocabulary=10_000), LOAD)
    assert few == 4 * 32 * (3 * 128 + 2 * 64)
    assert many == 3 * 4 * 32 * 10_000


def test_the_workspace_is_the_largest_unpacked_panel_in_float32_with_its_indices() -> None:
    assert (
        workspace_bytes(SHAPES, {"a": MatrixForm("int8"), "b": MatrixForm("fp32")}) == 4 * 64 * 128
    )
    assert workspace_bytes(SHAPES, all_in("bf16")) == 4 * 256 * 64
    assert workspace_bytes(SHAPES, all_in("fp32")) == 0
    for name, index_bits in (("q8", 16), ("q4", 16), ("nf4", 16), ("q3", 12), ("q2", 8)):
        assert workspace_bytes(SHAPES, all_in(name)) == (4 + index_bits / 8) * 256 * 64


def test_a_panel_has_at_most_256_rows_except_on_an_accelerator_and_in_bitsandbytes() -> None:
    tall = replace(SHAPES, matrices=(MatrixShape("a", 1000, 64, 0),))
    assert workspace_bytes(tall, {"a": MatrixForm("int8")}) == 4 * 256 * 64
    assert workspace_bytes(tall, {"a": MatrixForm("bnb-int8")}) == 4 * 1000 * 64
    assert workspace_bytes(tall, {"a": MatrixForm("int8")}, whole_matrices=True) == 4 * 1000 * 64


def test_the_peak_is_the_sum_of_its_parts_and_names_the_largest() -> None:
    peak = peak_bytes(SHAPES, all_in("nf4"), LOAD)
    parts = (
        backbone_bytes(SHAPES, all_in("nf4")),
        0,
        4 * 6400,
        adapter_bytes(LOAD),
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


def test_seconds_are_arithmetic_plus_traffic() -> None:
    formats = all_in("nf4")
    expected = step_flops(SHAPES, LOAD, 8) / 1e9 + moved_bytes(SHAPES, formats, LOAD, 8) / 1e8
    assert step_seconds(profile(), SHAPES, formats, LOAD, 8) == pytest.approx(expected)
    unknown = profile(matmul_flops_per_s={}, memory_bandwidth_bytes_per_s=0.0)
    assert step_seconds(unknown, SHAPES, formats, LOAD, 8) == 0.0


def test_the_tail_is_downloaded_and_never_uploaded() -> None:
    load = replace(LOAD, dense_parameters=10)
    assert download_bytes(load, 2) == 2 * (1000 + 300 + 10)
    assert upload_bytes(load, 2) == 2 * (1000 + 10)
    assert transfer_seconds(profile(), load, 2) == pytest.approx(2 * 2320 / 1e4)
    assert transfer_seconds(profile(link_bytes_per_s=0.0), load, 2) == 0.0
