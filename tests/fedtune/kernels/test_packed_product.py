"""Products with packed weights, against the product of unpacked weights in double precision."""

from __future__ import annotations

import pytest
import torch
from host import HostLauncher
from oracle import random_packed, values_of
from torch.library import opcheck

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, ops
from fedtune.kernels.packed import Bits, PackedWeights
from fedtune.kernels.packed_product import launch_packed_product

CPU = torch.device("cpu")
BOUND = {torch.bfloat16: 4.5e-3, torch.float16: 6e-4}  # half a step of the result, and a little


def case(
    bits: Bits, block: int, shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> tuple[PackedWeights, torch.Tensor, torch.Tensor]:
    """Weights, x, and their product in float64 of weights as they are rounded."""
    packed, codes = random_packed(bits, block, shape)
    weights = torch.from_numpy(values_of(packed, codes)[: packed.weights]).to(dtype).view(shape)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(5)).to(dtype)
    return packed, x, x.double() @ weights.double().t()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double().cpu() - expected).abs()
        # The result's own rounding, and float32 sums of terms that may cancel.
        allowed = BOUND[found.dtype] * expected.abs() + 2e-6 * float(expected.abs().max())
        assert bool((error <= allowed).all()), float((error - allowed).max())


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_body_multiplies_by_the_unpacked_weights(
    host: HostLauncher, bits: Bits, block: int, dtype: torch.dtype
) -> None:
    for shape, tokens in (((33, 256), 1), ((70, 768), 16), ((5, 1024), 17), ((32, 512), 32)):
        packed, x, expected = case(bits, block, shape, tokens, dtype)
        assert_near(launch_packed_product(host, x, packed), expected)


def test_torch_multiplies_by_the_unpacked_weights() -> None:
    packed, x, expected = case(3, 64, (10, 37), 4, torch.bfloat16)
    assert_near(dispatch.packed_product(x, packed), expected)


def test_no_token_and_tokens_at_an_odd_address_are_right(host: HostLauncher) -> None:
    packed, x, expected = case(4, 64, (9, 256), 3, torch.bfloat16)
    assert launch_packed_product(host, x[:0], packed).shape == (0, 9)
    room = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    odd = room[1:].view_as(x).copy_(x)
    assert_near(launch_packed_product(host, odd, packed), expected)


def test_it_wins_for_few_tokens_of_half_precision_and_whole_rows_of_groups(
    host: HostLauncher,
) -> None:
    packed, _ = random_packed(4, 64, (8, 512))
    ragged, _ = random_packed(4, 64, (8, 500))
    assert not dispatch.packed_product_wins(1, packed, torch.bfloat16)  # plain torch on a CPU
    with dispatch.chosen(host, CPU):
        assert dispatch.packed_product_wins(1, packed, torch.bfloat16)
        assert dispatch.packed_product_wins(32, packed, torch.float16)
        assert not dispatch.packed_product_wins(33, packed, torch.bfloat16)
        assert not dispatch.packed_product_wins(1, packed, torch.float32)
        assert not dispatch.packed_product_wins(1, ragged, torch.bfloat16)


def test_what_the_kernel_cannot_do_is_refused_or_left_to_torch(host: HostLauncher) -> None:
    packed, _ = random_packed(4, 64, (8, 512))
    ragged, _ = random_packed(4, 64, (8, 500))
    half = torch.zeros(2, 512, dtype=torch.float16)
    with pytest.raises(KernelError, match=r"contiguous \(tokens, 512\) .* got \(2, 500\)"):
        launch_packed_product(host, half[:, :500].contiguous(), packed)
    with pytest.raises(KernelError, match=r"a multiple of 256 weights, got .*, 2 and 500"):
        launch_packed_product(host, half[:, :500].contiguous(), ragged)
    with pytest.raises(KernelError, match="32 tokens at most"):
        launch_packed_product(host, half.repeat(20, 1), packed)
    with pytest.raises(KernelError, match=r"takes bfloat16 .* or float16"):
        launch_packed_product(host, half.float(), packed)
    host.launched.clear()
    with dispatch.chosen(host, CPU):
        assert dispatch.packed_product(half.float(), packed).shape == (2, 8)
        assert host.launched == []
        dispatch.packed_product(half, packed)
    assert host.launched == ["packed_product_4_1_f16"]


def test_torch_finds_no_fault_with_the_operator(device: torch.device) -> None:
    packed, x, _ = case(4, 64, (9, 256), 3, torch.bfloat16)
    p = packed.to(device)
    fields = p.codes, p.scale_codes, p.scale_steps, p.scale_offset, p.codebook
    opcheck(ops.packed_product, (x.to(device), *fields, p.bits, p.block, p.shape[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gpu_multiplies_by_the_unpacked_weights(bits: Bits, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    device = torch.device("cuda", 0)
    for shape, tokens in (((33, 256), 1), ((70, 768), 16), ((1000, 4096), 17), ((64, 1024), 32)):
        packed, x, expected = case(bits, 64, shape, tokens, dtype)
        packed = packed.to(device)
        assert dispatch.packed_product_wins(tokens, packed, dtype)
        assert_near(dispatch.packed_product(x.to(device), packed), expected)
