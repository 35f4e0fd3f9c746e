"""RMSNorm and its gradient, in every path."""

from __future__ import annotations

import pytest
import torch
from host import HostLauncher
from tolerances import DTYPES, assert_near, off_by_one, random, wide
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, launches

SHAPES = ((1, 1), (9, 7), (3, 128), (20, 64), (2, 1001), (3, 4096))
EPSILON = 1e-5


def assert_all_near(x: Tensor, weight: Tensor, gradient: Tensor, weight_offset: float) -> None:
    """Result and gradient against autograd of the plain formula in float64."""
    leaf = wide(x)
    inverse = (leaf.square().mean(1, keepdim=True) + EPSILON).rsqrt()
    expected = leaf * inverse * (weight_offset + weight.double())
    expected.backward(gradient.double())
    y, inverse_rms = dispatch.rms_norm(x, weight, EPSILON, weight_offset)
    assert y.dtype == x.dtype
    assert inverse_rms.dtype == torch.float32
    assert_near(inverse_rms, inverse.detach()[:, 0])
    assert_near(y, expected.detach(), roundings=2)
    found = dispatch.rms_norm_backward(gradient, x, weight, inverse_rms, weight_offset)
    assert found.dtype == x.dtype
    assert leaf.grad is not None
    assert_near(found, leaf.grad, absolute=1e-5)


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradient_are_those_of_autograd(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype, weight_offset: float
) -> None:
    x = random(*shape, dtype=dtype, device=device, scale=3.0)
    gradient = random(*shape, dtype=dtype, device=device, seed=1)
    for weight_dtype in {dtype, torch.float32}:
        weight = random(shape[1], dtype=weight_dtype, device=device, seed=2)
        assert_all_near(x, weight, gradient, weight_offset)
        assert_all_near(off_by_one(x), weight, gradient, weight_offset)
        assert_all_near(x, off_by_one(weight), off_by_one(gradient), weight_offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_two_forms_round_as_transformers_does(device: torch.device, dtype: torch.dtype) -> None:
    x = random(64, 96, dtype=dtype, device=device)
    weight = random(96, dtype=dtype, device=device, seed=2)
    wide_x = x.float()
    normal = wide_x * (wide_x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()
    llama, _ = dispatch.rms_norm(x, weight, EPSILON)
    gemma, _ = dispatch.rms_norm(x, weight, EPSILON, weight_offset=1.0)
    # One unit in the last place of float32 in the root moves a rounding in a few of 6144 values.
    assert float((llama == weight * normal.to(dtype)).float().mean()) > 0.998
    assert float((gemma == (normal * (1.0 + weight.float())).to(dtype)).float().mean()) > 0.998


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 2048])
def test_rows_may_lie_apart(device: torch.device, columns: int, dtype: torch.dtype) -> None:
    weight = random(columns, dtype=dtype, device=device, seed=2)
    for apart in (columns + 16, columns + 3):
        x = random(5, apart, dtype=dtype, device=device)[:, :columns]
        gradient = random(5, apart, dtype=dtype, device=device, seed=1)[:, :columns]
        assert_all_near(x, weight, gradient, 0.0)
    turned = random(columns, 5, dtype=dtype, device=device).t()
    assert_all_near(turned, weight, turned, 0.0)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_nothing_gives_nothing(device: torch.device, shape: tuple[int, int]) -> None:
    x, weight = torch.empty(shape, device=device), torch.empty(shape[1], device=device)
    y, inverse_rms = dispatch.rms_norm(x, weight, EPSILON)
    assert y.shape == shape
    assert inverse_rms.shape == (shape[0],)
    assert dispatch.rms_norm_backward(x, x, weight, inverse_rms).shape == shape


def test_wrong_shapes_are_refused(host: HostLauncher) -> None:
    x = torch.empty(2, 8)
    with pytest.raises(KernelError, match="x must have 2 dimensions"):
        launches.rms_norm(host, torch.empty(2, 2, 8), torch.empty(8), EPSILON)
    with pytest.raises(KernelError, match=r"x has 8 columns, and weight has shape \(7,\)"):
        launches.rms_norm(host, x, torch.empty(7), EPSILON)
    with pytest.raises(KernelError, match="as many inverse_rms as rows"):
        launches.rms_norm_backward(host, x, x, torch.empty(8), torch.empty(3))
