"""The quantiser against an exhaustive search, bitsandbytes, and the figures it promises."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fedtune.errors import ModelError
from fedtune.kernels.packed import SUPERBLOCK, Bits, PackedWeights, padded
from fedtune.kernels.unpack import dequantise
from fedtune.quant import quantise as quantise_module
from fedtune.quant.codebooks import BLOCKS, codebooks
from fedtune.quant.quantise import CodebookChoice, codebook_name, quantise

WIDTHS: tuple[Bits, ...] = (2, 3, 4, 8)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def dense(packed: PackedWeights) -> Tensor:
    return dequantise(packed, 0, torch.empty(packed.shape))


def squared_error(weight: Tensor, packed: PackedWeights) -> float:
    return float((dense(packed) - weight).double().square().sum())


def scales_of(packed: PackedWeights) -> Tensor:
    steps = packed.scale_steps.repeat_interleave(SUPERBLOCK)[: packed.scale_codes.numel()]
    return packed.scale_codes * steps + packed.scale_offset


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65, 7), (48, 128)])
def test_every_weight_gets_the_nearest_level_of_its_scale(
    bits: Bits, block: int, shape: tuple[int, int]
) -> None:
    weight = gaussian(*shape)
    packed = quantise(weight, bits, block)
    scales = scales_of(packed).repeat_interleave(block)[: weight.numel()]
    levels = scales[:, None] * packed.codebook
    nearest = (levels - weight.view(-1, 1)).abs().amin(dim=1)
    found = (dense(packed) - weight).abs().view(-1)
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    block=st.sampled_from(BLOCKS),
    height=st.integers(0, 40),
    width=st.integers(0, 70),
    exponent=st.integers(-30, 30),
    zeros=st.booleans(),
)
def test_any_finite_matrix_comes_back_within_half_a_step(
    bits: Bits, block: int, height: int, width: int, exponent: int, zeros: bool
) -> None:
    weight = gaussian(height, width, seed=height * 71 + width) * 2.0**exponent
    if zeros:
        weight[::2] = 0.0
    packed = quantise(weight, bits, block)
    found = dense(packed)
    assert found.shape == weight.shape
    assert bool(torch.isfinite(found).all())
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    levels = packed.codebook
    share = max(float(levels.diff().max()) / 2, 1 - float(levels.abs().amax()))
    assert bool(((found - weight).abs() <= largest * (share + 0.003)).all())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_matrix_takes_its_bits_and_a_scale_byte_per_block(bits: Bits, block: int) -> None:
    packed = quantise(gaussian(33, 1001), bits, block)
    row = padded(33 * 1001)
    assert packed.codes.numel() == row * bits // 8
    assert packed.scale_codes.numel() == row // block
    assert packed.scale_steps.numel() == -(-(row // block) // 256)
    assert packed.bytes == row * bits // 8 + row // block + 4 * (
        packed.scale_steps.numel() + 1 + 2**bits
    )


@pytest.mark.parametrize(("bits", "ratio"), [(2, 2.4), (3, 1.2), (4, 1.05)])
def test_lloyd_max_has_less_error_than_normal_float_on_gaussian_weights(
    bits: Bits, ratio: float
) -> None:
    weight = gaussian(512, 1024)
    errors = {
        name: squared_error(weight, quantise(weight, bits, 64, name))
        for name in codebooks(bits, 64)
    }
    assert errors["normal-float"] >= ratio * errors["lloyd-max"]
    best = quantise(weight, bits)
    assert squared_error(weight, best) == errors["lloyd-max"]
    assert codebook_name(best) == "lloyd-max"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_that_are_ternary_already_choose_normal_float_and_come_back_exactly(
    bits: Bits,
) -> None:
    weight = 0.5 * torch.randint(-1, 2, (64, 96), generator=torch.Generator().manual_seed(0))
    packed = quantise(weight, bits)
    assert codebook_name(packed) == "normal-float"
    assert torch.equal(dense(packed), weight)


def test_the_importance_of_columns_decides_between_codebooks() -> None:
    ternary = torch.randint(-1, 2, (256, 32), generator=torch.Generator().manual_seed(0)) * 0.02
    weight = torch.cat([ternary, gaussian(256, 32)], dim=1)
    first, second = torch.zeros(2, 64)
    first[:32], second[32:] = 1.0, 1.0
    names = [codebook_name(quantise(weight, 2, 32, column_weights=w)) for w in (first, second)]
    assert names == ["normal-float", "lloyd-max"]


@pytest.mark.parametrize("choice", ["normal-float", "lloyd-max", "best"])
def test_eight_bits_are_normal_float_whatever_is_asked_for(choice: CodebookChoice) -> None:
    assert codebook_name(quantise(gaussian(8, 64), 8, codebook=choice)) == "normal-float"


def test_codes_are_those_of_bitsandbytes_where_the_scales_are() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # Every block has one maximum, 0.05, so that neither side rounds a scale.
    weight = gaussian(64, 256).clamp(-0.05, 0.05)
    weight.view(-1, 64)[:, 7] = 0.05
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantise(weight, 4, 64, "normal-float")
    assert torch.equal(ours.codes, codes.view(-1))
    torch.testing.assert_close(
        dense(ours), functional.dequantize_4bit(codes, state), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("block", [64, 128])
def test_double_quantised_scales_cost_less_than_a_hundredth_of_the_error(block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(256, 1024)
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    theirs = float((functional.dequantize_4bit(codes, state) - weight).norm())
    ours = squared_error(weight, quantise(weight, 4, block, "normal-float")) ** 0.5
    assert ours <= 1.01 * theirs


def test_a_block_beside_one_a_thousand_times_larger_is_not_lost() -> None:
    weight = gaussian(4, 1024)
    weight.view(-1, 64)[0] *= 1000
    weight.view(-1, 64)[1] = 0.0  # so that the smallest scale is no help
    others = slice(128, None)
    lost = (dense(quantise(weight, 4)) - weight).view(-1)[others].norm()
    assert float(lost / weight.view(-1)[others].norm()) < 0.9


def test_padding_does_not_coarsen_the_scales() -> None:
    """33 x 33 leaves two blocks of padding; their zeros must not become the smallest scale."""
    weight = gaussian(33, 33)
    row = torch.nn.functional.pad(weight.view(-1), (0, 18 * 64 - 33 * 33))
    smallest = row.view(-1, 64).abs().amax(dim=1).amin()
    assert float(quantise(weight, 4).scale_offset) == float(smallest)


def test_padding_does_not_count_as_an_error() -> None:
    """NormalFloat holds the padding's zeros exactly, which is worth nothing."""
    weight = torch.tensor([[1.0, 0.59, 0.59, 0.59, -0.59, 0.17, -0.17, -0.17]])
    assert codebook_name(quantise(weight, 2)) == "lloyd-max"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_weights_does_not_matter(dtype: torch.dtype) -> None:
    weight = gaussian(16, 64).to(dtype)
    one, two = quantise(weight, 4), quantise(weight.float(), 4)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale_codes, two.scale_codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_chunks_do_not_show(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(50, 100)
    whole = quantise(weight, bits)
    monkeypatch.setattr(quantise_module, "CHUNK", 512)
    parts = quantise(weight, bits)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale_steps, parts.scale_steps)


def test_a_transposed_view_is_quantised_as_its_copy() -> None:
    weight = gaussian(64, 32).t()
    assert torch.equal(quantise(weight, 4).codes, quantise(weight.contiguous(), 4).codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = gaussian(4, 64)
    weight[2, 3] = value
    with pytest.raises(ModelError, match=r"shape \(4, 64\) holds weights that are not finite"):
        quantise(weight, 4)


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ModelError, match=r"one of \(32, 64, 128\) weights, got 16"):
        quantise(gaussian(4, 64), 4, 16)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_matrix_is_never_held_in_float32(bits: Bits) -> None:
    """Beyond the result for each codebook there are scales and the temporaries of a chunk."""
    weight = gaussian(2048, 2752).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        packed = quantise(weight, bits)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    kept = packed.codes.numel() * len(codebooks(bits, 64))
    assert packed.bytes <= held.max() <= kept + 10 * 2**20 < 4 * weight.numel()


def test_eleven_million_weights_take_seconds_at_most() -> None:
    weight = gaussian(4096, 2752)
    started = time.perf_counter()
    quantise(weight, 4)
    assert time.perf_counter() - started < 5.0  # 0.15 s on one thread of a quiet machine
