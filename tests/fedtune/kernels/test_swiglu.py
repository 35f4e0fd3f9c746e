"""SwiGLU and its gradients, in every path."""

from __future__ import annotations

import pytest
import torch
from host import HostLauncher
from tolerances import DTYPES, assert_near, off_by_one, random, wide
from torch import Tensor
from torch.nn import functional

from fedtune.errors import KernelError
from fedtune.kernels import dispatch, launches

SHAPES = ((1, 1), (3, 17), (2, 3, 64), (5, 1000), (40, 96))


def expected_of(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result and both gradients, in float64."""
    leaves = wide(gate), wide(up)
    result = functional.silu(leaves[0]) * leaves[1]
    result.backward(gradient.double())
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    return result.detach(), leaves[0].grad, leaves[1].grad


def assert_all_near(gate: Tensor, up: Tensor, gradient: Tensor) -> None:
    expected = expected_of(gate, up, gradient)
    assert_near(dispatch.swiglu(gate, up), expected[0])
    found = dispatch.swiglu_backward_(gradient, gate, up)
    assert found[0] is gate
    assert found[1] is up
    assert_near(gate, expected[1])
    assert_near(up, expected[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_those_of_autograd(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    parts = [random(*shape, dtype=dtype, device=device, seed=i, scale=3.0) for i in range(3)]
    assert_all_near(*parts)
    assert_all_near(*(off_by_one(part) for part in parts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 33])
def test_gate_and_up_may_be_halves_of_one_buffer(
    device: torch.device, columns: int, dtype: torch.dtype
) -> None:
    both = random(2, 5, 2 * columns, dtype=dtype, device=device)
    gradient = random(2, 5, columns, dtype=dtype, device=device, seed=1)
    assert_all_near(both[..., :columns], both[..., columns:], gradient)


def test_a_gradient_may_have_any_strides(device: torch.device) -> None:
    parts = [random(6, 40, dtype=torch.float32, device=device, seed=i) for i in range(2)]
    gradient = random(40, 6, dtype=torch.float32, device=device, seed=2).t()
    assert_all_near(*parts, gradient)
    assert_all_near(*parts, torch.ones(1, 1, device=device).expand(6, 40))


def test_large_gates_do_not_overflow(device: torch.device) -> None:
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], device=device)
    up = torch.ones(5, device=device)
    assert_near(dispatch.swiglu(gate, up), torch.tensor([0.0, 0, 0, 90, 200]).double())
    dispatch.swiglu_backward_(torch.ones(5, device=device), gate, up)
    assert_near(gate, torch.tensor([0.0, 0, 0.5, 1, 1]).double())


def test_nothing_gives_nothing(device: torch.device) -> None:
    nothing = torch.empty(0, 8, device=device)
    assert dispatch.swiglu(nothing, nothing).shape == (0, 8)
    dispatch.swiglu_backward_(nothing, nothing.clone(), nothing.clone())


def test_wrong_shapes_dtypes_and_strides_are_refused(host: HostLauncher) -> None:
    gate = torch.empty(4, 6)
    with pytest.raises(KernelError, match="must have one shape"):
        launches.swiglu(host, gate, torch.empty(4, 5))
    with pytest.raises(KernelError, match="must have one dtype"):
        launches.swiglu(host, gate, gate.half())
    with pytest.raises(KernelError, match="rows of gate must be dense"):
        launches.swiglu(host, torch.empty(6, 4).t(), gate)
    with pytest.raises(KernelError, match="rows at equal distances"):
        launches.swiglu(host, torch.empty(3, 4, 6)[:, :2].transpose(0, 1), torch.empty(2, 3, 6))
