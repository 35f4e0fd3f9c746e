"""A device's step as one CUDA graph: the launches are recorded once and then replayed.

A batch of the same shape is copied to where the recorded kernels read. On a CPU the step runs
again instead of being replayed, so that all but the recording itself can be tried there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from contenders.ours import DeviceTrainer
from contenders.workloads import LEARNING_RATE, Sample
from fedtune.model.loss import loss_sum, loss_units, prepare

_PRACTICE = 3
"""Steps before the recording, in which libraries choose their algorithms and allocate."""


class CapturedTrainer(DeviceTrainer):
    """A device's trainer whose steps all have the shape of the first."""

    _replay: Callable[[], None] | None = None

    def restart(self) -> None:
        super().restart()
        trained = list(self._mounted.trained().values())
        on_gpu = trained[0].is_cuda
        self._adam = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, weight_decay=0.0, capturable=on_gpu
        )
        self._replay = None

    def step(self, batch: Sequence[Sample]) -> float:
        prepared = prepare(self.model, batch, 0, "causal-lm")
        if self._replay is None:
            self._held, self._units = prepared, loss_units(batch, "causal-lm")
            self._replay = self._record()
        for held, new in zip(_tensors(self._held), _tensors(prepared), strict=True):
            held.copy_(new)
        self._replay()
        return float(self._loss)

    def _record(self) -> Callable[[], None]:
        """The step as something to call; factors and optimiser are as before afterwards."""
        if self.model.device.type != "cuda":
            return self._run
        trained = list(self._mounted.trained().values())
        before = [t.detach().clone() for t in trained]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_PRACTICE):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        self._adam.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._run(clear=False)
        with torch.no_grad():
            for tensor, value in zip(trained, before, strict=True):
                tensor.copy_(value)
                for state in self._adam.state[tensor].values():
                    state.zero_()
        return graph.replay

    def _run(self, clear: bool = True) -> None:
        # Recorded gradients are written anew in each replay, so none are cleared there.
        total = loss_sum(self.model, self._held, "causal-lm").total / self._units
        total.backward()
        self._adam.step()
        if clear:
            self._adam.zero_grad(set_to_none=True)
        self._loss = total.detach()


def _tensors(batch: Any) -> Iterator[Tensor]:  # dataclasses within dataclasses
    """Every tensor of a prepared batch, in a fixed order."""
    for entry in fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)
