"""The adapter alone, as a folder that the library PEFT loads onto the base.

PEFT itself is not needed: the folder is two files in a fixed form. Each matrix has its own rank,
and alpha equals the rank, so that PEFT's scale alpha / rank is 1 and the factors hold the update
as it is.

Source: PEFT's checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from fedtune.errors import RunError
from fedtune.export.merge import linear_module
from fedtune.model.load import module_path
from fedtune.model.replace import is_transposed
from fedtune.records import GlobalAdapter, LowRank, TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
_PREFIX = "base_model.model."


def write_peft(
    base: Path,
    adapter: GlobalAdapter,
    task: TaskName,
    labels: Sequence[str],
    folder: Path,
    base_name: str = "",
    revision: str = "",
) -> None:
    """Write a PEFT LoRA folder: `adapter_config.json`, `adapter_model.safetensors`, a README.

    Args:
        base: folder of the base model; only its config is read.
        labels: class names in the order of their indices; empty for language modelling.
        base_name: how the adapter names its base (a hub id); default the folder's path.
        revision: of the base, where it comes from the hub.

    Raises:
        ModelError: a matrix of the adapter is not a linear layer of the base.
        RunError: the adapter changes no matrix.
    """
    skeleton = _skeleton(base, task, len(labels))
    factors = {name: balanced_factors(low_rank) for name, low_rank in adapter.matrices.items()}
    factors = {name: pair for name, pair in factors.items() if pair[0].shape[0] > 0}
    if not factors:
        raise RunError("the adapter changes no matrix yet; export after the first round")
    modules = {name: linear_module(name, skeleton) for name in factors}
    paths = {name: module_path(name, skeleton) for name in factors}
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, (a, b) in factors.items():
        tensors[f"{_PREFIX}{paths[name]}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{paths[name]}.lora_B.weight"] = b
    for name, value in adapter.dense.items():
        tensors[f"{_PREFIX}{name}"] = np.ascontiguousarray(value, dtype=np.float32)
    ranks = {paths[name]: int(a.shape[0]) for name, (a, _) in factors.items()}
    heads = sorted({_saved_module(name, skeleton) for name in adapter.dense})
    transposed = any(is_transposed(module) for module in modules.values())
    config = _config(ranks, heads, task, base_name or str(base), revision, transposed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    card = _card(config, task, labels)
    (folder / "README.md").write_text(card, encoding="utf-8")


def balanced_factors(update: LowRank) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Split `u @ diag(sigma) @ v.T` into a (rank, in) and b (out, rank) of equal norm.

    Each factor takes the square root of the singular values; directions whose singular value is
    zero are left out, so the rank may be smaller than the update's.
    """
    kept = update.sigma > 0
    root = np.sqrt(update.sigma[kept].astype(np.float64))
    a = (update.v[:, kept] * root).T
    b = update.u[:, kept] * root
    return np.ascontiguousarray(a, dtype=np.float32), np.ascontiguousarray(b, dtype=np.float32)


def _saved_module(parameter: str, skeleton: PreTrainedModel) -> str:
    """The module that PEFT shall replace whole: a task head is one module, however deep it is.

    PEFT adds `classifier` and `score` to the list by itself; naming a part of one beside it would
    wrap that part twice.
    """
    head, _, _ = parameter.partition(".")
    return parameter.rpartition(".")[0] if head == skeleton.base_model_prefix else head


def _skeleton(base: Path, task: TaskName, labels: int) -> PreTrainedModel:
    """The task's model without weights: its module names are those that PEFT will see."""
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    with torch.device("meta"):
        if task == "causal-lm":
            return AutoModelForCausalLM.from_config(config)
        config.num_labels = max(labels, 1)
        return AutoModelForSequenceClassification.from_config(config)


def _config(
    ranks: Mapping[str, int],
    heads: Sequence[str],
    task: TaskName,
    base_name: str,
    revision: str,
    transposed: bool,
) -> dict[str, object]:
    largest = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[task],
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": list(heads) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,  # the base's layers store (in, out)
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _card(config: Mapping[str, object], task: TaskName, labels: Sequence[str]) -> str:
    base_name = json.dumps(config["base_model_name_or_path"])
    auto, extra = "AutoModelForCausalLM", ""
    if task == "sequence-classification":
        auto = "AutoModelForSequenceClassification"
        names = dict(enumerate(labels))
        indices = {label: index for index, label in names.items()}
        extra = f", id2label={names}, label2id={indices}"
    return f"""---
base_model: {base_name}
library_name: peft
tags: [lora, fedtune, federated-learning]
---

A LoRA adapter of {base_name}, trained with fedtune over several devices.

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base_name}{extra})
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
```
"""
