"""LoRA training as a device of fedtune does it, through the library's own functions."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from contenders.workloads import LEARNING_RATE, SCALE, Sample, first_factors
from fedtune.lora.linear import AdaptedLinear
from fedtune.model.backbone import Backbone, BackboneShelf
from fedtune.model.blocks import fuse
from fedtune.model.shapes import read_shapes
from fedtune.quant.storage import store
from fedtune.records import ComputeName, Dispatch, FormatName, LoraFactors, MatrixForm
from fedtune.train.compute import compute_dtype
from fedtune.train.optimizer import RoundOptimizer
from fedtune.train.round import mount, set_checkpointing, unmount
from fedtune.train.step import accumulate
from fedtune.wire.messages import OptimizerSpec

SPEC = OptimizerSpec("adamw", LEARNING_RATE, LEARNING_RATE, max_gradient_norm=0.0)


class DeviceTrainer:
    """A backbone with one device's factors on it, stepped as in a round."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model = backbone.model
        layers = backbone.layers.items()
        factors = first_factors({n: (m.out_features, m.in_features) for n, m in layers})
        self._sent = Dispatch({n: LoraFactors(a, b, SCALE) for n, (a, b) in factors.items()})
        self._mounted = mount(backbone, self._sent, trainable=True)
        self.restart()

    def restart(self) -> None:
        """Put the factors that all start from, and forget the optimiser's state."""
        unmount(self.backbone, self._mounted)
        self._mounted = mount(self.backbone, self._sent, trainable=True)
        self.optimizer = RoundOptimizer(self._mounted.trained(), SPEC, 1)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block's activations in the backward pass, or keep them."""
        set_checkpointing(self.backbone, on)

    def step(self, batch: Sequence[Sample]) -> float:
        """Train on a batch and give its loss before the step."""
        loss = accumulate(self.backbone, batch, len(batch), "causal-lm", 0)
        self.optimizer.step()
        return loss


def from_folder(folder: Path, weights: FormatName, compute: ComputeName) -> DeviceTrainer:
    """A trainer over a model folder, loaded as a device loads it.

    Args:
        weights: a backbone format.
        compute: `fp32` or `bf16`, of products and activations.
    """
    names = [matrix.name for matrix in read_shapes(folder, ("all-linear",)).matrices]
    dtype = compute_dtype(compute, torch.device("cpu"))
    shelf = BackboneShelf(folder, torch.device("cpu"), keep_base=False, compute=dtype)
    return DeviceTrainer(shelf.get("causal-lm", (), dict.fromkeys(names, MatrixForm(weights))))


def quantise(base: Any, names: Sequence[str], form: MatrixForm) -> Backbone:
    """A backbone over a model that is in memory already, on whatever device."""
    layers = {}
    for name in names:
        linear = base.get_submodule(name)
        layers[name] = AdaptedLinear(store(linear.weight, form), None).eval()
        base.set_submodule(name, layers[name])
    base.requires_grad_(False)
    fuse(base)
    return Backbone(base.eval(), layers, threading.Lock())
