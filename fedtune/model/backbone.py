"""The frozen base with its matrices held in chosen formats, read once and shared by devices.

A worker process may simulate hundreds of devices. Those whose plans name the same formats use one
`Backbone`; embeddings, norms and biases are shared even between formats. A device then costs its
adapter and its optimiser state.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedtune.errors import ModelError
from fedtune.lora.linear import AdaptedLinear, Correction
from fedtune.model.load import load_base, module_path
from fedtune.quant.correction import Pair, store_corrected
from fedtune.records import MatrixForm, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Backbone:
    """A loaded base whose adaptable matrices are `AdaptedLinear`.

    Attributes:
        layers: matrix name (as in the safetensors header) -> its module.
        dense: name -> parameter that is trained whole (a task head); shared between devices, so
            whoever trains sets it first, under `lock`.
        lock: one device at a time uses the model.
    """

    model: PreTrainedModel
    layers: Mapping[str, AdaptedLinear]
    lock: threading.Lock

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter with that name in the loaded task model."""
        try:
            parameter: nn.Parameter = self.model.get_parameter(name)
        except AttributeError:
            raise ModelError(f"{type(self.model).__name__} has no parameter {name}") from None
        return parameter

    @property
    def packed_bytes(self) -> int:
        """Bytes of all matrices in their forms, without correction pairs."""
        return sum(layer.matrix.bytes for layer in self.layers.values())


class BackboneShelf:
    """The backbones of one process, each built once.

    Args:
        folder: local folder of the base.
        torch_device: where the matrices live.
        keep_base: keep the base as it was read, so that another format needs no second reading;
            a device of its own, which uses one format, does not want that copy.
    """

    def __init__(self, folder: Path, torch_device: torch.device, keep_base: bool) -> None:
        self._folder, self._device, self._keep_base = folder, torch_device, keep_base
        self._base: dict[tuple[object, ...], PreTrainedModel] = {}
        self._backbones: dict[tuple[object, ...], Backbone] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._backbones)

    def get(
        self,
        task: TaskName,
        labels: Sequence[str],
        forms: Mapping[str, MatrixForm],
    ) -> Backbone:
        """The backbone with each named matrix held in its form; built on first use.

        Raises:
            ModelError: a matrix is not a linear module of the model.
        """
        task_key = (task, tuple(labels))
        key = (*task_key, tuple(sorted(forms.items())))
        with self._lock:
            if key not in self._backbones:
                base = self._base.get(task_key) or load_base(self._folder, task, labels)
                if self._keep_base:
                    self._base[task_key] = base
                    base = _sharing_copy(base)
                self._backbones[key] = _build(base, forms, self._device)
            return self._backbones[key]


def _sharing_copy(base: PreTrainedModel) -> PreTrainedModel:
    """The same modules anew, around the very same parameters and buffers."""
    shared = {id(p): p for p in base.parameters()} | {id(b): b for b in base.buffers()}
    return copy.deepcopy(base, memo=dict(shared))


def _build(
    model: PreTrainedModel, forms: Mapping[str, MatrixForm], torch_device: torch.device
) -> Backbone:
    """Put `AdaptedLinear` over the packed matrix in place of each matrix named in `forms`."""
    layers: dict[str, AdaptedLinear] = {}
    for name, form in forms.items():
        path = module_path(name, model)
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"matrix {name} is a {type(linear).__name__}, and only linear layers can be "
                "adapted; leave it out of lora.targets"
            )
        stored, pair = store_corrected(linear.weight, form)
        adapted = AdaptedLinear(stored, linear.bias).eval()
        adapted.correction = None if pair is None else _on(torch_device, pair)
        model.set_submodule(path, adapted)
        layers[name] = adapted
    if torch_device.type != "cpu":
        for layer in layers.values():
            layer.matrix = layer.matrix.to(torch_device)
        model.to(torch_device)
    return Backbone(model, layers, threading.Lock())


def _on(torch_device: torch.device, pair: Pair) -> Correction:
    """The pair as the layer takes it, where the layer computes."""
    return Correction(pair.a.to(torch_device), pair.b.to(torch_device))
