"""Load a base model from a folder and find in it the matrices that the coordinator names.

The coordinator names matrices as the folder's safetensors header does; a loaded task model may
hold the same matrix under a prefix (`bert.encoder...` for `encoder...`). `module_path` maps one to
the other, and is the only place that knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from fedtune.errors import MissingExtraError, ModelError
from fedtune.model.source import weight_files
from fedtune.records import TaskName

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LABEL_SENTINEL = 7919
"""A prime that no head size has: marks the axis that counts labels in `dense_shapes`."""


def load_base(
    folder: Path,
    task: TaskName,
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load the base for a task, frozen, in evaluation mode, from a local folder only.

    Args:
        folder: Hugging Face model folder with safetensors weights.
        labels: class names, in the order of their indices; only for classification.
        dtype: of all floating-point parameters.

    Raises:
        ModelError: the folder cannot be loaded as that task's model, or lacks weights that are
            not a task head.
    """
    config = task_config(folder, task, labels)
    auto = auto_class(task)
    with quiet_transformers():
        try:
            model, info = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise not_loadable(folder, task, error) from error
    check_complete(folder, task, model, info["missing_keys"])
    model.requires_grad_(False)
    model.eval()
    return model


def not_loadable(folder: Path, task: TaskName, error: Exception) -> ModelError:
    """The error that says in one line why a folder is not that task's model."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return ModelError(f"model folder {folder} cannot be loaded for {task}: {line}")


def check_complete(
    folder: Path, task: TaskName, model: PreTrainedModel, missing: Collection[str]
) -> None:
    """Refuse a folder that lacks weights; a classifier's head is made anew and may be missing.

    Raises:
        ModelError: a language model's folder lacks weights.
    """
    if missing and task == "causal-lm":
        raise ModelError(
            f"model folder {folder} lacks weights that {type(model).__name__} needs: "
            f"{', '.join(sorted(missing)[:3])}; is it a causal language model?"
        )


def dense_shapes(folder: Path, task: TaskName, held: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the folder does not hold and that are trained whole.

    For causal language modelling there are none. For classification they are the task head; the
    axis that counts labels is given as 0, because the fleet's label list is not known yet.

    Args:
        folder: model folder; only its config is read.
        held: names of all tensors in the folder's safetensors headers.
    """
    if task == "causal-lm":
        return {}
    config = task_config(folder, task, [str(i) for i in range(_LABEL_SENTINEL)])
    with torch.device("meta"), quiet_transformers():
        model = auto_class(task).from_config(config)
    present = {_match(name, model) for name in held}
    return {
        name: tuple(0 if axis == _LABEL_SENTINEL else int(axis) for axis in parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in present
    }


def module_path(name: str, model: PreTrainedModel) -> str:
    """Path of the module that holds matrix `name` of the safetensors header.

    Raises:
        ModelError: the loaded model has no such module.
    """
    path = _match(f"{name}.weight", model).removesuffix(".weight")
    try:
        model.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"matrix {name} of the model folder is not a module of {type(model).__name__}; "
            "name other matrices in lora.targets"
        ) from None
    return path


def tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in the folder's safetensors files, sorted."""
    names: set[str] = set()
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as opened:
            names.update(opened.keys())
    return sorted(names)


def _match(parameter: str, model: PreTrainedModel) -> str:
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for candidate in (parameter, prefix + parameter, parameter.removeprefix(prefix)):
        if candidate in own:
            return candidate
    return parameter


def task_config(folder: Path, task: TaskName, labels: Sequence[str]) -> PretrainedConfig:
    """The folder's config, with the labels of a classification task.

    Raises:
        ModelError: there is no config that transformers understands.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"model folder {folder} has no usable config.json: {line}") from error
    if task == "sequence-classification":
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
        if config.pad_token_id is None:
            config.pad_token_id = config.eos_token_id
    return config


def auto_class(task: TaskName) -> Any:  # transformers is untyped
    """The class of transformers that picks a task's model by the config."""
    transformers = _transformers()
    classes = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
    }
    return classes[task]


def _transformers() -> Any:  # the library is untyped
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "train", "loading a base model") from None
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices of missing heads off the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
