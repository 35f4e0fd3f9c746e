"""A device's step as CUDA graphs, through the library's own recording.

On a CPU the same static form is computed instead of being replayed, so that all but the recording
itself can be tried there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from contenders.ours import SPEC, DeviceTrainer
from contenders.workloads import Sample
from fedtune.lora.linear import attach
from fedtune.model.loss import loss_units
from fedtune.train.form import fill, form_of
from fedtune.train.graph import StaticStep, StepGraphs, forget_graphs, step_graphs
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.step import accumulate


class CapturedTrainer(DeviceTrainer):
    """A device's trainer that records a form of batches when it first sees one."""

    def restart(self) -> None:
        super().restart()
        forget_graphs(self.backbone)  # each cell pays for its own memory alone
        self._graphs: StepGraphs | None = None
        trained = self._mounted.trained()
        self.optimizer = RoundOptimizer(trained, SPEC, 1, keeps_gradients=True)

    def step(self, batch: Sequence[Sample]) -> float:
        if self.model.device.type != "cuda":
            loss = self._unrecorded(batch)
        else:
            if self._graphs is None:
                # Now, not at the restart: whether blocks are recomputed is set in between.
                factors = self._mounted.factors
                self._graphs = step_graphs(self.backbone, factors, "causal-lm", "on")
            loss = accumulate(self.backbone, batch, len(batch), "causal-lm", 0, graphs=self._graphs)
        self.optimizer.step()
        return loss

    def _unrecorded(self, batch: Sequence[Sample]) -> float:
        attach(self.backbone.layers, self._mounted.factors)
        trained, form = list(self._mounted.trained().values()), form_of(batch)
        for tensor in trained:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        step, units = StaticStep(form, trained), loss_units(batch, "causal-lm")
        lengths = fill(step.buffer, batch, form, 0, 1.0 / units)
        return float(step.add(self.backbone, lengths)) / units
