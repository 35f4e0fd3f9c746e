"""Build a base without ever holding its large matrices: they are read one at a time, later.

transformers decides how a file's tensors become a model: it renames them, ties embeddings,
computes buffers, draws what the folder lacks. We let it, on everything but the matrices that will
be held in a smaller form. In place of each of those it is given a stand-in: a single zero that
claims the matrix's shape and takes no memory. Where the stand-in turns up in the finished model is
where the matrix belongs, whatever transformers calls it there.

A stand-in that does not turn up was computed with (split, stacked, permuted), and the matrix in
the file is then not the matrix of the model: the caller must load the base as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.model.load import (
    auto_class,
    check_complete,
    not_loadable,
    quiet_transformers,
    task_config,
)
from fedtune.model.replace import linear_at
from fedtune.model.shapes import is_expert, read_header
from fedtune.model.source import weight_files
from fedtune.records import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 0
"""Of what the folder lacks; the coordinator sends other values before anyone trains."""


class BaseTensors:
    """The tensors of a folder's safetensors files, each mapped from disk when it is asked for.

    A tensor's pages are in memory only while it is in use: each reading is a mapping of its own,
    which ends with the tensor. The mapping is private, so writing to a tensor leaves the file
    alone.

    Raises:
        ModelError: the folder has no weights, or a file is cut off or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            for name, entry in read_header(file).items():
                self.shapes[name], self._files[name] = entry.shape, file

    def read(self, name: str) -> Tensor:
        """The tensor in the file's dtype and orientation.

        Raises:
            ModelError: the file has gone, or is another one now.
        """
        try:
            with safe_open(self._files[name], framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self._files[name]} cannot be read: {error}") from None
        return tensor


class _OnDemand:
    """A tensor that is mapped at the moment transformers takes it, and let go after that."""

    def __init__(self, tensors: BaseTensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, part: object) -> Tensor:
        tensor: Tensor = self._tensors.read(self._name)[part]  # type: ignore[index]
        return tensor


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A frozen model that lacks some of its matrices.

    Attributes:
        places: matrix name, as in the safetensors header -> path of the module that lacks it.
        lost: matrices that transformers does not take over as they are in the file.
    """

    model: PreTrainedModel
    places: dict[str, str]
    lost: tuple[str, ...]


def stream_base(
    folder: Path,
    tensors: BaseTensors,
    task: TaskName,
    labels: Sequence[str],
    absent: Collection[str],
    dtype: torch.dtype = torch.float32,
) -> Skeleton:
    """Load the base for a task, frozen, in evaluation mode, without the matrices in `absent`.

    Args:
        labels: class names, in the order of their indices; only for classification.
        absent: names of matrices in the safetensors header, without `.weight`.
        dtype: of all floating-point parameters; one that is stored so stays on disk, mapped.

    Raises:
        ModelError: the folder cannot be loaded as that task's model.
    """
    config = task_config(folder, task, labels)
    stand_ins: dict[str, Tensor] = {}
    state: dict[str, Tensor | _OnDemand] = {}
    for name, shape in tensors.shapes.items():
        matrix = name.removesuffix(".weight")
        if matrix in absent and matrix != name:
            state[name] = stand_ins[matrix] = _stand_in(shape, dtype)
        else:
            state[name] = _OnDemand(tensors, name)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        try:
            with torch.device("meta"):
                plan = auto_class(task).from_config(config)
            _refuse_stacks(plan, absent)
            model, info = type(plan).from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise not_loadable(folder, task, error) from error
    check_complete(folder, task, model, info["missing_keys"])
    model.config.name_or_path = str(folder)
    model.requires_grad_(False)
    model.eval()
    places = _places(model, stand_ins)
    return Skeleton(model, places, tuple(sorted(set(absent) - set(places))))


def put(model: nn.Module, path: str, weight: Tensor) -> None:
    """Give a module that lacks its matrix the matrix."""
    module = model.get_submodule(path)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _refuse_stacks(model: PreTrainedModel, absent: Collection[str]) -> None:
    """Matrices of experts that transformers stacks into one tensor cannot be held apart."""
    own = {name for name, _ in model.named_parameters()}
    stacked = [n for n in sorted(absent) if is_expert(n) and f"{n}.weight" not in own]
    if stacked:
        raise ModelError(
            f"{', '.join(stacked[:3])}{' and others' if len(stacked) > 3 else ''}: "
            f"{type(model).__name__} stacks the matrices of its experts into one tensor, and "
            "only linear layers can be adapted; leave them out of lora.targets"
        )


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


def _places(model: PreTrainedModel, stand_ins: dict[str, Tensor]) -> dict[str, str]:
    """Where each stand-in is found in the model, by the address of its one number.

    Raises:
        ModelError: a stand-in is in a module that is not linear, or in two modules at once.
    """
    names = {tensor.data_ptr(): name for name, tensor in stand_ins.items()}
    places: dict[str, str] = {}
    for parameter_path, parameter in model.named_parameters(remove_duplicate=False):
        name = names.get(parameter.data_ptr())
        if name is None:
            continue
        path = parameter_path.removesuffix(".weight")
        linear_at(model, path, name)
        if name in places:
            raise ModelError(
                f"matrix {name} is tied: {places[name]} and {path} share it, and an adapter "
                "would part them; leave it out of lora.targets"
            )
        places[name] = path
    return places
