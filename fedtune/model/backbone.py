"""The frozen base with its matrices held in chosen formats, read once and shared by devices.

A worker process may simulate hundreds of devices. Those whose plans name the same forms use one
`Backbone`; embeddings, norms and biases are shared even between forms. A device then costs its
adapter and its optimiser state.

The matrices are read and quantised one after the other, so that building takes no more memory
than the result and one matrix.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.lora.linear import AdaptedLinear, Correction
from fedtune.model.blocks import fuse
from fedtune.model.load import dense_shapes, load_base, module_path, tensor_names
from fedtune.model.packed_cache import Finished, PackedCache
from fedtune.model.precision import compute_in
from fedtune.model.replace import coverage, linear_at, oriented
from fedtune.model.source import base_digest
from fedtune.model.stream import BaseTensors, Skeleton, put, stream_base
from fedtune.quant.correction import Pair, store_corrected
from fedtune.quant.dense import DTYPES
from fedtune.quant.storage import StoredMatrix
from fedtune.records import MatrixForm, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

Key = tuple[TaskName, tuple[str, ...], tuple[tuple[str, MatrixForm], ...]]


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
        keep_base: keep what backbones share (embeddings, norms, biases), so that another set of
            forms brings only its matrices; a device of its own, which uses one, does not need it.
        compute: dtype of activations and products.
        packed: where finished matrices are kept between processes; None: nowhere.
    """

    def __init__(
        self,
        folder: Path,
        torch_device: torch.device,
        keep_base: bool,
        compute: torch.dtype = torch.float32,
        packed: PackedCache | None = None,
    ) -> None:
        self._folder, self._device, self._keep_base = folder, torch_device, keep_base
        self._compute, self._packed = compute, packed
        self._tensors: BaseTensors | None = None
        self._skeletons: dict[tuple[object, ...], Skeleton] = {}
        self._backbones: dict[Key, Backbone] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._backbones)

    @staticmethod
    def key(task: TaskName, labels: Sequence[str], forms: Mapping[str, MatrixForm]) -> Key:
        """What tells a shelf's backbones apart."""
        return (task, tuple(labels), tuple(sorted(forms.items())))

    def other_bytes(self, key: Key | None) -> int:
        """What all backbones but one hold; parameters that they share count once."""
        with self._lock:
            others = [each for found, each in self._backbones.items() if found != key]
            return _held_bytes(others)

    def drop_others(self, key: Key | None) -> None:
        """Let go of all backbones but one, and of what only they use."""
        with self._lock:
            self._backbones = {k: v for k, v in self._backbones.items() if k == key}
            if not self._backbones:
                self._skeletons.clear()

    def get(
        self,
        task: TaskName,
        labels: Sequence[str],
        forms: Mapping[str, MatrixForm],
    ) -> Backbone:
        """The backbone with each named matrix held in its form; built on first use.

        Raises:
            ModelError: the folder cannot be loaded, or a matrix is not a linear layer.
        """
        key = self.key(task, labels, forms)
        with self._lock:
            if key not in self._backbones:
                skeleton = self._skeleton(task, tuple(labels), forms)
                backbone = self._build(skeleton, forms)
                if self._compute != torch.float32:
                    heads = dense_shapes(self._folder, task, tensor_names(self._folder))
                    for name in heads:
                        head = backbone.parameter(name)
                        head.data = head.data.float()
                    compute_in(backbone.model, self._compute, trained_whole=heads)
                fuse(backbone.model)
                self._backbones[key] = backbone
            return self._backbones[key]

    def _skeleton(
        self, task: TaskName, labels: tuple[str, ...], forms: Mapping[str, MatrixForm]
    ) -> Skeleton:
        """The base without the matrices in `forms`, for the caller to change."""
        key = (task, labels)
        skeleton = self._skeletons.get(key)
        if skeleton is None or not forms.keys() <= skeleton.places.keys():
            self._tensors = self._tensors or BaseTensors(self._folder)
            skeleton = stream_base(self._folder, self._tensors, task, labels, forms, self._compute)
            if skeleton.lost:
                return self._whole(skeleton, task, labels)
            if self._keep_base:
                self._skeletons[key] = skeleton
        return _sharing_copy(skeleton) if self._keep_base else skeleton

    def _whole(self, streamed: Skeleton, task: TaskName, labels: tuple[str, ...]) -> Skeleton:
        """The base as transformers loads it, where that is not what is in the file."""
        for name in streamed.lost:
            linear_at(streamed.model, module_path(name, streamed.model), name)
        _log.info(
            "%s computes with %s while it loads; the base is read as a whole, unquantised",
            type(streamed.model).__name__,
            streamed.lost[0],
        )
        # Never kept: a backbone may cast its parameters, and the next needs them as they were.
        return Skeleton(load_base(self._folder, task, labels), {}, ())

    def _build(self, skeleton: Skeleton, forms: Mapping[str, MatrixForm]) -> Backbone:
        """Put `AdaptedLinear` over the packed matrix in place of each matrix in `forms`."""
        model, tensors = skeleton.model, self._tensors
        assert tensors is not None
        paths = {name: skeleton.places.get(name) or module_path(name, model) for name in forms}
        modules = {name: linear_at(model, path, name) for name, path in paths.items()}

        def weight(name: str) -> Tensor:
            """The matrix (out, in), from the model where it is there and else from the file."""
            module = modules[name]
            in_file = name in skeleton.places
            held = tensors.read(f"{name}.weight") if in_file else module.get_parameter("weight")
            return oriented(held.to(self._device), module)

        layers: dict[str, AdaptedLinear] = {}
        held = self._held(forms, weight)
        matrices = dict(held.matrices)
        for name, path in paths.items():
            bias = dict(modules[name].named_parameters()).get("bias")
            adapted = AdaptedLinear(matrices.pop(name), bias).eval()
            if pair := held.pairs.get(name):
                adapted.correction = Correction(pair.a.to(self._device), pair.b.to(self._device))
            model.set_submodule(path, adapted)
            layers[name] = adapted
        for name in skeleton.places.keys() - forms.keys():
            # Absent for another set of forms, and plain in this one.
            put(model, skeleton.places[name], tensors.read(f"{name}.weight").to(model.dtype))
        if self._device.type != "cpu":
            model.to(self._device)
        _log.info("%s: %s", type(model).__name__, coverage(model))
        return Backbone(model, layers, threading.Lock())

    def _held(self, forms: Mapping[str, MatrixForm], weight: Callable[[str], Tensor]) -> Finished:
        """Every matrix in its form: as an earlier process left it, or made one by one.

        They are made on the device where they stay: a GPU quantises many times faster.
        """
        # Floats are as near in the base's own files.
        packed = {name: form for name, form in forms.items() if form.format not in DTYPES}
        found: Finished | None = None
        if self._packed is not None and packed:
            digest = base_digest(self._folder)
            found = self._packed.read(digest, packed)
            if found is None:
                found = _finish(packed, weight)
                self._packed.write(digest, packed, found)
        kept = found or Finished({})
        rest = {name: form for name, form in forms.items() if name not in kept.matrices}
        made = _finish(rest, weight)
        matrices = {**kept.matrices, **made.matrices}
        return Finished(
            {name: matrix.to(self._device) for name, matrix in matrices.items()},
            {**kept.pairs, **made.pairs},
        )


def _held_bytes(backbones: Sequence[Backbone]) -> int:
    tensors: dict[int, int] = {
        id(tensor): tensor.numel() * tensor.element_size()
        for backbone in backbones
        for tensor in (*backbone.model.parameters(), *backbone.model.buffers())
    }
    packed = sum(backbone.packed_bytes for backbone in backbones)
    return packed + sum(tensors.values())


def _finish(forms: Mapping[str, MatrixForm], weight: Callable[[str], Tensor]) -> Finished:
    """Every matrix in its form, and the pairs that those with a correction rank have."""
    matrices: dict[str, StoredMatrix] = {}
    pairs: dict[str, Pair] = {}
    for name, form in forms.items():
        matrices[name], pair = store_corrected(weight(name), form)
        if pair is not None:
            pairs[name] = pair
    return Finished(matrices, pairs)


def _sharing_copy(skeleton: Skeleton) -> Skeleton:
    """The same modules anew, around the very same parameters and buffers."""
    base = skeleton.model
    shared = {id(p): p for p in base.parameters()} | {id(b): b for b in base.buffers()}
    return replace(skeleton, model=copy.deepcopy(base, memo=dict(shared)))
