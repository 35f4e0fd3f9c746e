"""Frozen matrices: what they keep, how near their values are, and how they are written down."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedtune.errors import MissingExtraError, ModelError
from fedtune.lora.linear import FrozenMatrix
from fedtune.plan.cost import matrix_bytes
from fedtune.quant.block import BlockMatrix
from fedtune.quant.storage import StoredMatrix, restore, store
from fedtune.records import BACKBONE_FORMATS, BLOCK_BITS, FormatName, MatrixForm, MatrixShape

# Relative Frobenius errors of a Gaussian matrix; NF4 at block 64 has 0.092 (QLoRA's codebook),
# the others are those of the codebooks' densities a few thousandths up.
LARGEST_ERROR: dict[FormatName, float] = {
    "fp32": 0.0,
    "bf16": 0.003,
    "fp16": 0.0004,
    "q8": 0.0056,
    "int8": 0.008,
    "q4": 0.089,
    "nf4": 0.094,
    "q3": 0.181,
    "q2": 0.348,
    "bnb-int8": 0.012,
    "bnb-nf4": 0.1,
}
BITS: dict[FormatName, float] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "q8": 8,
    "int8": 8,
    "q4": 4,
    "nf4": 4,
    "q3": 3,
    "q2": 2,
    "bnb-int8": 8,
    "bnb-nf4": 4,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def held(weight: Tensor, format_name: FormatName) -> StoredMatrix:
    if format_name.startswith("bnb-"):
        pytest.importorskip("bitsandbytes")
    return store(weight, MatrixForm(format_name))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
class TestEveryFormat:
    def test_is_a_frozen_matrix(self, weight: Tensor, format_name: FormatName) -> None:
        matrix = held(weight, format_name)
        assert isinstance(matrix, FrozenMatrix)
        assert matrix.format == format_name

    def test_values_are_within_the_error_of_the_format(
        self, weight: Tensor, format_name: FormatName
    ) -> None:
        matrix = held(weight, format_name)
        values = matrix.values(torch.float32)
        assert matrix.shape == (96, 128)
        assert values.shape == weight.shape
        error = float((values - weight).norm() / weight.norm())
        assert error <= LARGEST_ERROR[format_name]
        assert (error == 0.0) == (format_name == "fp32")

    def test_storage_keeps_the_bits_of_the_format(
        self, weight: Tensor, format_name: FormatName
    ) -> None:
        matrix = held(weight, format_name)
        bits = 8 * matrix.bytes / weight.numel()
        assert BITS[format_name] <= bits <= BITS[format_name] + 0.26
        kept = sum(t.numel() * t.element_size() for t in matrix.tensors().values())
        codebook = 4 * 2**matrix.packed.bits if isinstance(matrix, BlockMatrix) else 0
        # Beside its scales bitsandbytes keeps tables of its own.
        assert kept - codebook == matrix.bytes or format_name == "bnb-nf4"

    @pytest.mark.parametrize("shape", [(96, 128), (3, 33), (700, 65)])
    def test_the_planner_counts_the_same_bytes(
        self, format_name: FormatName, shape: tuple[int, int]
    ) -> None:
        matrix = held(torch.ones(shape), format_name)
        assert matrix_bytes(MatrixShape("w", *shape, 0), format_name) == matrix.bytes

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_narrow_values_are_the_float32_values_rounded_once(
        self, weight: Tensor, format_name: FormatName, dtype: torch.dtype
    ) -> None:
        matrix = held(weight, format_name)
        assert torch.equal(matrix.values(dtype), matrix.values(torch.float32).to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (256, 24), (600, 33)])
    def test_panels_are_the_rows_of_the_values_in_order(
        self, format_name: FormatName, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        matrix = held(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), format_name)
        expected, reached = matrix.values(dtype), 0
        for first, panel in matrix.panels(dtype):
            assert first == reached
            assert panel.dtype == dtype
            assert torch.equal(panel, expected[first : first + len(panel)])
            reached += len(panel)
        assert reached == shape[0]

    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65, 7)])
    def test_odd_shapes_survive(self, shape: tuple[int, int], format_name: FormatName) -> None:
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        values = held(weight, format_name).values(torch.float32)
        assert values.shape == shape
        error = float((values - weight).norm() / weight.norm())
        assert error < (0.45 if format_name == "q2" else 0.22)

    def test_what_is_written_down_comes_back_bit_for_bit(
        self, weight: Tensor, format_name: FormatName
    ) -> None:
        matrix = held(weight, format_name)
        tensors = load(save(matrix.tensors()))
        again = restore(format_name, matrix.shape, tensors, matrix.metadata())
        assert type(again) is type(matrix)
        assert (again.format, again.shape, again.bytes) == (
            format_name,
            matrix.shape,
            matrix.bytes,
        )
        assert again.metadata() == matrix.metadata()
        assert torch.equal(again.values(torch.float32), matrix.values(torch.float32))

    def test_moving_keeps_the_values(self, weight: Tensor, format_name: FormatName) -> None:
        matrix = held(weight, format_name)
        moved = matrix.to(torch.device("cpu"))
        assert torch.equal(moved.values(torch.float32), matrix.values(torch.float32))


OWN = tuple(name for name in BACKBONE_FORMATS if not name.startswith("bnb-"))


@pytest.mark.parametrize("format_name", OWN)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0)])
def test_an_empty_matrix_is_held_and_comes_back(
    format_name: FormatName, shape: tuple[int, int]
) -> None:
    matrix = store(torch.zeros(shape), MatrixForm(format_name))
    assert matrix.values(torch.float32).shape == shape
    assert sum(len(panel) for _, panel in matrix.panels(torch.bfloat16)) == shape[0]


@pytest.mark.parametrize("format_name", [name for name in OWN if name != "fp32"])
def test_panels_share_one_workspace_of_256_rows(format_name: FormatName) -> None:
    matrix = store(torch.randn(600, 40), MatrixForm(format_name))
    seen = [(len(panel), panel.data_ptr()) for _, panel in matrix.panels(torch.float32)]
    assert [rows for rows, _ in seen] == [256, 256, 88]
    assert len({pointer for _, pointer in seen}) == 1


@pytest.mark.parametrize("format_name", ["bf16", "int8", "q3"])
def test_rows_of_a_panel_are_rounded_up_to_a_multiple_of_256(format_name: FormatName) -> None:
    matrix = store(torch.randn(1100, 8), MatrixForm(format_name))
    assert [first for first, _ in matrix.panels(torch.float32, rows=300)] == [0, 512, 1024]


@pytest.mark.parametrize("format_name", ["fp32", "bf16", "fp16"])
def test_a_matrix_in_the_dtype_asked_for_is_its_own_panel(format_name: FormatName) -> None:
    matrix = store(torch.randn(600, 8), MatrixForm(format_name))
    dtype = matrix.tensors()["weight"].dtype
    ((first, panel),) = matrix.panels(dtype)
    assert (first, panel.data_ptr()) == (0, matrix.tensors()["weight"].data_ptr())


@pytest.mark.parametrize("format_name", list(BLOCK_BITS))
@pytest.mark.parametrize("block", [32, 64, 128])
def test_a_form_names_the_block_and_0_is_64(format_name: FormatName, block: int) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    matrix = store(weight, MatrixForm(format_name, block))
    assert matrix.metadata()["block"] == str(block)
    assert matrix.bytes == matrix_bytes(MatrixShape("w", 32, 128, 0), format_name, block)
    assert store(weight, MatrixForm(format_name)).metadata()["block"] == "64"


def test_smaller_blocks_are_nearer(weight: Tensor) -> None:
    def error(block: int) -> float:
        values = store(weight, MatrixForm("q3", block)).values(torch.float32)
        return float((values - weight).norm())

    assert error(32) < error(64) < error(128)


def test_the_codebook_is_chosen_per_matrix_and_named_except_in_nf4(weight: Tensor) -> None:
    ternary = weight.sign() * (weight.abs() > 1)
    names = [store(w, MatrixForm("q3")).metadata()["codebook"] for w in (weight, ternary)]
    assert names == ["lloyd-max", "normal-float"]
    assert store(weight, MatrixForm("nf4")).metadata()["codebook"] == "normal-float"


def test_nf4_is_as_near_as_that_of_bitsandbytes() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    errors = {
        name: float((held(weight, name).values(torch.float32) - weight).norm())
        for name in ("nf4", "bnb-nf4", "q4")
    }
    assert errors["nf4"] <= 1.01 * errors["bnb-nf4"]
    assert errors["q4"] < errors["nf4"]


def test_int8_has_the_values_of_bitsandbytes(weight: Tensor) -> None:
    ours, theirs = (held(weight, name).values(torch.float32) for name in ("int8", "bnb-int8"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.zeros(4, 64)
    for name in OWN:
        assert not store(weight, MatrixForm(name)).values(torch.float32).any()


def test_a_matrix_beyond_the_range_of_fp16_is_refused() -> None:
    with pytest.raises(ModelError, match=r"beyond fp16's 65504; choose the format bf16"):
        store(torch.full((2, 2), 1e5), MatrixForm("fp16"))


def test_int8_refuses_weights_that_are_not_finite() -> None:
    with pytest.raises(ModelError, match=r"shape \(2, 2\) holds weights that are not finite"):
        store(torch.full((2, 2), torch.inf), MatrixForm("int8"))


def test_a_block_that_is_not_known_is_refused(weight: Tensor) -> None:
    with pytest.raises(ModelError, match=r"one of \(32, 64, 128\) weights, got 48"):
        store(weight, MatrixForm("q4", 48))


def test_bitsandbytes_is_imported_for_its_own_formats_only() -> None:
    names = ", ".join(repr(name) for name in OWN)
    code = (
        "import sys, torch\n"
        "from fedtune.quant.storage import store\n"
        "from fedtune.records import MatrixForm\n"
        f"for name in ({names}):\n"
        "    store(torch.ones(4, 64), MatrixForm(name)).values(torch.float32)\n"
        "sys.exit('bitsandbytes' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("format_name", ["bnb-int8", "bnb-nf4"])
def test_a_missing_bitsandbytes_is_named_with_its_extra(
    weight: Tensor, format_name: FormatName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"a bnb-int8 or bnb-nf4 backbone needs .*train"):
        store(weight, MatrixForm(format_name))
