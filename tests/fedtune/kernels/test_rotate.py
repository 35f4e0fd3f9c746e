"""Rotary embedding in place, and its backward pass, in every path."""

from __future__ import annotations

import pytest
import torch
from host import HostLauncher
from tolerances import DTYPES, assert_near, off_by_one, random, wide
from torch import Tensor

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, launches

SHAPES = ((1, 1, 2), (5, 3, 64), (4, 2, 128), (3, 2, 20), (7, 1, 6))


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in transformers' apply_rotary_pos_emb, in float64."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.double()[:, None] + turned * sin.double()[:, None]


def angles(
    tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    turns = random(tokens, head_dim, dtype=torch.float32, device=device, seed=5)
    return turns.cos().to(dtype), turns.sin().to(dtype)


def assert_near_and_inverse_is_backward(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    leaf, gradient = wide(x), torch.flip(x, (0,)).contiguous()
    expected = formula(leaf, cos, sin)
    expected.backward(gradient.double())
    assert dispatch.rotate_(x, cos, sin) is x
    assert_near(x, expected.detach())
    assert leaf.grad is not None
    assert_near(dispatch.rotate_(gradient, cos, sin, inverse=True), leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_its_backward_pass_are_those_of_the_formula(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    for angle_dtype in {dtype, torch.float32}:
        cos, sin = angles(shape[0], shape[2], angle_dtype, device)
        assert_near_and_inverse_is_backward(x.clone(), cos, sin)
        assert_near_and_inverse_is_backward(off_by_one(x), cos, sin)
        assert_near_and_inverse_is_backward(x.clone(), off_by_one(cos), sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 12])
def test_queries_and_keys_turn_within_the_fused_projection(
    device: torch.device, head_dim: int, dtype: torch.dtype
) -> None:
    tokens, query_heads, key_heads = 5, 4, 2
    fused = random(tokens, (query_heads + 2 * key_heads) * head_dim, dtype=dtype, device=device)
    before = fused.clone()
    heads = fused.view(tokens, -1, head_dim)
    cos, sin = angles(tokens, head_dim, torch.float32, device)
    for part in (slice(0, query_heads), slice(query_heads, query_heads + key_heads)):
        expected = formula(heads[:, part].double(), cos, sin)
        dispatch.rotate_(heads[:, part], cos, sin)
        assert_near(heads[:, part], expected)
    values = (query_heads + key_heads) * head_dim
    assert torch.equal(fused[:, values:], before[:, values:])


def test_heads_may_come_first_in_memory(device: torch.device) -> None:
    x = random(3, 6, 16, dtype=torch.float32, device=device).transpose(0, 1)
    cos, sin = angles(6, 16, torch.float32, device)
    assert_near_and_inverse_is_backward(x, cos, sin)


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (3, 2, 0)])
def test_nothing_stays_nothing(device: torch.device, shape: tuple[int, int, int]) -> None:
    x, angle = torch.empty(shape, device=device), torch.empty(shape[0], shape[2], device=device)
    assert dispatch.rotate_(x, angle, angle).shape == shape


def test_wrong_shapes_and_strides_are_refused(host: HostLauncher) -> None:
    with pytest.raises(KernelError, match="cos and sin of shape"):
        launches.rotate_(host, torch.empty(3, 2, 8), torch.empty(3, 4), torch.empty(3, 4))
    with pytest.raises(KernelError, match="needs an even last size"):
        launches.rotate_(host, torch.empty(3, 2, 7), torch.empty(3, 7), torch.empty(3, 7))
    with pytest.raises(KernelError, match="last dimension of x must be dense"):
        launches.rotate_(
            host, torch.empty(3, 8, 2).transpose(1, 2), torch.empty(3, 8), torch.empty(3, 8)
        )
