"""What a device's AdamW carries from one round to the next: the squares, in a form that no change
of basis or rank touches.

Between two rounds the coordinator joins all devices' updates and factors the result anew. The rank
directions of the new factors are other ones than before: singular vectors turn, change sign and
swap places, and their number may change. So

- the mean of the gradients is dropped: it is a direction in a basis that is gone;
- the squares are kept as their mean over the rank, one number per input of A and per output of B.
  A turn R of the rank directions makes R times it of the gradient of A, and the sum over the rank
  of its squares in a column is the same for every orthonormal R. A new rank gets that mean as
  well; with zeros its first step would be 1 / sqrt(1 - beta2), 32 times, too long;
- parameters that are trained whole have no rank; their squares are kept as they are.

The size of the directions may change too, which this leaves out: the coordinator balances both
factors by the singular values, and those change slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

_STEPS = "steps"


@dataclass(slots=True)
class OptimizerMemory:
    """The squares of one device in one run, on the device that computes.

    Names are those of the wire: `<matrix>.a` (rank, in), `<matrix>.b` (out, rank) and
    `dense.<name>`.

    Attributes:
        squares: name -> running mean of the squared gradients, averaged over the rank.
        steps: name -> steps that mean has seen.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def restore(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Start an AdamW from the kept squares; parameters without any are left to begin anew."""
        if not isinstance(optimizer, AdamW):
            return
        for name in self.squares.keys() & parameters.keys():
            parameter = parameters[name]
            steps = torch.tensor(float(self.steps[name]))
            # torch's fused AdamW counts on the device.
            optimizer.state[parameter] = {
                "step": steps.to(parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.empty_like(parameter).copy_(
                    _widened(self.squares[name], name, parameter)
                ),
            }

    def store(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Take the squares over; those of matrices that were not trained now stay."""
        if not isinstance(optimizer, AdamW):
            return
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter)
            if state:
                self.squares[name] = _narrowed(state["exp_avg_sq"].detach(), name)
                self.steps[name] = int(state["step"])

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for a file."""
        steps = {f"{_STEPS}.{name}": torch.tensor(count) for name, count in self.steps.items()}
        return {f"squares.{name}": value for name, value in self.squares.items()} | steps

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> OptimizerMemory:
        """The way back from `tensors`."""
        memory = cls()
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            if kind == _STEPS:
                memory.steps[name] = int(value)
            else:
                memory.squares[name] = value
        return memory


def _rank_axis(name: str) -> int | None:
    if name.startswith("dense."):
        return None
    return 0 if name.endswith(".a") else 1


def _narrowed(squares: Tensor, name: str) -> Tensor:
    axis = _rank_axis(name)
    return squares.clone() if axis is None else squares.mean(dim=axis)


def _widened(squares: Tensor, name: str, parameter: Tensor) -> Tensor:
    axis = _rank_axis(name)
    whole = squares if axis is None else squares.unsqueeze(axis)
    return whole.to(parameter.device).expand_as(parameter)
