"""The operators of torch: torch's own checks of each, and gradients by finite differences."""

from __future__ import annotations

import pytest
import torch
from oracle import random_packed, values_of
from torch import Tensor
from torch.library import opcheck

from fedtune.kernels import ops

PACKED, CODES = random_packed(4, 64, (6, 100))
FIELDS = (
    PACKED.codes,
    PACKED.scale_codes,
    PACKED.scale_steps,
    PACKED.scale_offset,
    PACKED.codebook,
    PACKED.bits,
    PACKED.block,
    *PACKED.shape,
)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_finds_no_fault_with_an_operator(device: torch.device, dtype: torch.dtype) -> None:
    x, gate, up, logits = (leaf(5, 12, dtype=dtype).detach().to(device) for _ in range(4))
    for tensor in (x, gate, up, logits):
        tensor.requires_grad_()
    weight = torch.ones(12, device=device)
    targets = torch.tensor([0, 3, 11, -100, 5], device=device)
    packed = [field.to(device) if isinstance(field, Tensor) else field for field in FIELDS]
    # The step through AOTAutograd compares results of the eager run with those of a traced one.
    opcheck(ops.dequantise, (*packed, dtype))
    opcheck(ops.swiglu, (gate, up))
    opcheck(ops.rms_norm, (x, weight, 1e-5, 1.0))
    opcheck(ops.cross_entropy, (logits, targets, torch.ones(5, device=device)))


def test_dequantise_is_the_dense_matrix() -> None:
    dense = torch.ops.fedtune.dequantise(*FIELDS, torch.float32)
    assert torch.equal(dense, torch.from_numpy(values_of(PACKED, CODES)[:600].reshape(6, 100)))


def test_gradients_are_those_of_finite_differences() -> None:
    x, gate, up, logits = (leaf(3, 7, dtype=torch.float64) for _ in range(4))
    weight = leaf(7, dtype=torch.float64).detach()
    targets, weights = torch.tensor([6, -100, 2]), torch.tensor([0.5, 1.0, 2.0]).double()

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return torch.ops.fedtune.swiglu(gate, up)

    def norm(x: Tensor) -> Tensor:
        return torch.ops.fedtune.rms_norm(x, weight, 1e-5, 1.0)[0]

    def loss(logits: Tensor) -> Tensor:
        return torch.ops.fedtune.cross_entropy(logits, targets, weights)[0]

    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(loss, (logits,))


def test_a_row_of_weight_zero_does_not_spoil_the_loss() -> None:
    logits = torch.zeros(2, 4)
    logits[1] = torch.nan
    loss, gradient = ops.cross_entropy(logits, torch.tensor([1, 2]), torch.tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx(1.3862944)
    assert not bool(gradient[1].any())
