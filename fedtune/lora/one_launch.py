"""The low-rank side of several devices on a GPU: all devices' part of a layer in one launch.

A CPU computes device by device, so that each gets the bits that it gets alone. On a GPU a launch
costs more than the few rows that it works on, and its libraries choose how to round by the shape of
a product, so that no two shapes give the same bits anyway: there the frozen product takes all rows
at once, and the low-rank products of all devices go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.kernels.low_rank import Groups, groups_of
from fedtune.lora.grouped import add_update_, update_gradients_

_KEPT = 64
"""Descriptions of groups that are kept: one for each set of ranks in a model, a few in practice."""


@runtime_checkable
class DeviceStack(Protocol):
    """One device's factors of some layers; see `fedtune.lora.linear`."""

    a: Tensor
    b: tuple[Tensor, ...]
    scales: tuple[float, ...]
    sizes: tuple[int, ...]
    trained: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Side:
    """What all devices add to one layer.

    Attributes:
        a: the devices' rows, one below the other; each has its trained rows first.
        b: the same rows of their B, turned.
        groups: which tokens and rows are whose.
        trained: how many rows of each device are trained.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "rank out"]
    groups: Groups
    trained: tuple[int, ...]

    def add_(self, y: Tensor, rows: Tensor) -> Tensor:
        """Add every device's part to its rows of y; returns what `gradients` needs."""
        return add_update_(y, rows, self.a, self.b, self.groups)

    def gradients(
        self, grad_x: Tensor, gradient: Tensor, rows: Tensor, low: Tensor
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Gradients of A and B of each device, None for what is not trained; adds to grad_x."""
        grad_a, grad_b = update_gradients_(grad_x, gradient, rows, low, self.a, self.b, self.groups)
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        start = 0
        for size, count in zip(self.groups.ranks, self.trained, strict=True):
            own = slice(start, start + count)
            pairs.append((grad_a[own], grad_b[own].t()) if count else (None, None))
            start += size
        return pairs


def sides_of(
    stacks: Sequence[DeviceStack], token_counts: Sequence[int], known: dict[object, Groups]
) -> list[Side | None]:
    """What the stacks' devices add to each of their layers; None where no device adds anything.

    Args:
        token_counts: rows of each device in the pass.
        known: groups that were described before; grows.
    """
    cut = [
        torch.split_with_sizes(stack.a, stack.sizes) if stack.a.numel() else None
        for stack in stacks
    ]
    sides: list[Side | None] = []
    for i in range(len(stacks[0].sizes)):
        sizes = tuple(stack.sizes[i] for stack in stacks)
        if not any(sizes):
            sides.append(None)
            continue
        scales = tuple(stack.scales[i] for stack in stacks)
        a = torch.cat([own[i] for own in cut if own is not None and len(own[i])])
        b = torch.cat([stack.b[i] for stack in stacks if stack.sizes[i]])
        groups = _groups(tuple(token_counts), sizes, scales, a.device, known)
        sides.append(Side(a, b, groups, tuple(stack.trained[i] for stack in stacks)))
    return sides


def _groups(
    token_counts: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    device: torch.device,
    known: dict[object, Groups],
) -> Groups:
    """The same groups for all layers of a pass that have the same ranks: each is an upload."""
    key = token_counts, ranks, scales
    if key not in known:
        if len(known) >= _KEPT:
            known.clear()
        known[key] = groups_of(token_counts, ranks, scales, device)
    return known[key]
