"""How near a result must be to the float64 result, for each dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_near(
    found: Tensor, expected: Tensor, roundings: int = 1, absolute: float = 1e-6
) -> None:
    """Within so many roundings of the dtype of `found`, and `absolute`."""
    relative = roundings * _RELATIVE[found.dtype] * 1.01
    torch.testing.assert_close(found.double().cpu(), expected.cpu(), rtol=relative, atol=absolute)


def random(
    *shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def wide(tensor: Tensor) -> Tensor:
    """A float64 leaf with these values."""
    return tensor.detach().double().requires_grad_()


def off_by_one(tensor: Tensor) -> Tensor:
    """The same values at an address that 16-byte accesses cannot take."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)
