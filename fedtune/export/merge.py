"""The merged model: the full-precision base with the global adapter added, as plain weights.

The result is a Hugging Face folder that `transformers` loads alone. Devices trained on quantised
copies of the base; the merge goes into the base itself, so no device's quantisation error is in
it. The base is loaded as the task's model and saved again, because that is what decides how
`transformers` names each tensor.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from fedtune.errors import ModelError, RunError
from fedtune.model.load import (
    dense_shapes,
    load_base,
    module_path,
    quiet_transformers,
    tensor_names,
)
from fedtune.model.replace import linear_at, oriented
from fedtune.model.source import weight_files
from fedtune.records import GlobalAdapter, LowRank, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
"""Files of the base that the merged model needs beside its weights, as glob patterns."""

_SHARD_SIZE = "5GB"


def write_merged(
    base: Path, adapter: GlobalAdapter, task: TaskName, labels: Sequence[str], folder: Path
) -> None:
    """Write base plus adapter as a Hugging Face folder in the base's own dtype.

    Args:
        base: folder of the base model, with safetensors weights.
        adapter: what to add; its `dense` values replace the task head.
        labels: class names in the order of their indices; empty for language modelling.
        folder: is created when missing.

    Raises:
        ModelError: the base cannot be loaded, or a matrix of the adapter does not fit it.
        RunError: the adapter lacks a part of the task head.
    """
    model = merged_model(base, adapter, task, labels)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    copy_companions(base, folder)


def merged_model(
    base: Path, adapter: GlobalAdapter, task: TaskName, labels: Sequence[str]
) -> PreTrainedModel:
    """Load the base in its own dtype and add the adapter to its weights.

    Raises:
        ModelError: the base cannot be loaded, or a matrix of the adapter does not fit it.
        RunError: the adapter lacks a part of the task head.
    """
    needed = dense_shapes(base, task, tensor_names(base))
    missing = needed.keys() - adapter.dense.keys()
    if missing:
        raise RunError(
            f"the checkpoint lacks {', '.join(sorted(missing))}, which {base} has not either; "
            "export from a checkpoint of a finished round"
        )
    model = load_base(base, task, labels, base_dtype(base))
    for name, low_rank in adapter.matrices.items():
        add_update(linear_module(name, model), low_rank, name)
    for name, value in adapter.dense.items():
        _set_parameter(model, name, torch.tensor(value))
    return model


def base_dtype(base: Path) -> torch.dtype:
    """The floating dtype that holds most of the base's parameters, from its safetensors headers.

    Raises:
        ModelError: the weights are in no dtype that an update can be added to.
    """
    counts: Counter[str] = Counter()
    for shard in weight_files(base):
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  an opened file is not a mapping
                tensor = opened.get_slice(name)
                counts[tensor.get_dtype()] += torch.Size(tensor.get_shape()).numel()
    for name, _ in counts.most_common():
        if name in _DTYPES:
            return _DTYPES[name]
    raise ModelError(
        f"model folder {base} holds weights in {', '.join(counts) or 'no format'}; expected "
        f"safetensors in one of {', '.join(_DTYPES)}: use the unquantised base"
    )


def linear_module(name: str, model: PreTrainedModel) -> nn.Module:
    """The linear layer that holds matrix `name` of the base's safetensors header.

    Raises:
        ModelError: there is no such module, or it is not a linear layer.
    """
    return linear_at(model, module_path(name, model), name)


@torch.no_grad()
def add_update(module: nn.Module, update: LowRank, name: str) -> None:
    """Add `u @ diag(sigma) @ v.T` to a weight, summed in float64, rounded once.

    The weight keeps the orientation in which its module stores it.

    Raises:
        ModelError: the update's shape is not the weight's.
    """
    shape = (update.u.shape[0], update.v.shape[0])
    weight = oriented(module.get_parameter("weight"), module)
    if shape != tuple(weight.shape):
        raise ModelError(
            f"the adapter of {name} is {shape[0]}x{shape[1]}, the base's weight is "
            f"{'x'.join(map(str, weight.shape))}; use the base that the run was trained on"
        )
    if update.rank == 0:
        return
    left = torch.from_numpy(update.u.astype("float64") * update.sigma)  # (out, rank)
    right = torch.from_numpy(update.v.astype("float64"))  # (in, rank)
    weight.copy_(weight.double() + left @ right.T)


@torch.no_grad()
def _set_parameter(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise ModelError(f"{type(model).__name__} has no parameter {name}") from None
    if parameter.shape != value.shape:
        raise ModelError(
            f"{name} of the checkpoint is {tuple(value.shape)}, the model's is "
            f"{tuple(parameter.shape)}; the list of labels is not that of the run"
        )
    parameter.copy_(value)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy the base's tokenizer, chat template and licence files."""
    for pattern in _COPIED:
        for source in sorted(base.glob(pattern)):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
