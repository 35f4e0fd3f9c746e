"""What a device carries from one round of a run to the next, and keeps on its own disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtune.train.compute import LossScale
from fedtune.train.memory import OptimizerMemory
from fedtune.wire.feedback import ErrorFeedback
from fedtune.wire.messages import TrainInstruction
from fedtune_client.round_states import RoundStates


class Carried:
    """What training is started with and changes, beside what the coordinator sends.

    Args:
        folder: where it is kept by round; None: as long as this process lives.

    Attributes:
        optimizer: what earlier rounds left of AdamW; None: nothing is kept.
        feedback: what earlier updates' codec left out; None: nothing is kept.
        loss_scale: for float16.
    """

    def __init__(self, folder: Path | None) -> None:
        self._states = RoundStates(folder)
        self.optimizer: OptimizerMemory | None = None
        self.feedback: ErrorFeedback | None = None
        self.loss_scale = LossScale()
        self._half = False

    def begin(self, order: TrainInstruction, half: bool) -> None:
        """Start from what the rounds before this one left, though it may have been played once.

        Args:
            half: the device computes in float16, and so needs a loss scale.
        """
        found = self._states.before(order.run, order.round)
        self.optimizer = self.feedback = None
        if order.error_feedback and order.codec != "fp32":
            kept = {name: each.numpy() for name, each in _of("feedback", found).items()}
            self.feedback = ErrorFeedback.from_tensors(kept) if kept else ErrorFeedback()
        if order.optimizer.keep:
            self.optimizer = OptimizerMemory.from_tensors(_of("optimizer", found))
        self._half = half
        if half:
            self.loss_scale = LossScale.from_tensors(_of("loss_scale", found))

    def end(self, order: TrainInstruction) -> None:
        """Keep what the next round starts from.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        states: dict[str, Tensor] = {}
        if self.feedback is not None:
            kept = {name: torch.as_tensor(each) for name, each in self.feedback.tensors().items()}
            states |= _under("feedback", kept)
        if self.optimizer is not None:
            states |= _under("optimizer", self.optimizer.tensors())
        if self._half:
            states |= _under("loss_scale", self.loss_scale.tensors())
        if states:
            self._states.keep(order.run, order.round, states)


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One part of what a device carries, as it is named among all of it."""
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def _of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back from `_under`."""
    own = f"{part}/"
    return {
        name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)
    }
