"""Let the frozen part of a model compute in bfloat16 or float16; what is trained stays float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compute_in(model: PreTrainedModel, dtype: torch.dtype, trained_whole: Collection[str]) -> None:
    """Make a frozen model's activations run in a dtype.

    Embeddings, norms, biases and other frozen parameters are cast in place, so that models which
    share them share the result. Buffers stay as they are: rotary frequencies need float32.
    Parameters that are trained whole (a task head) stay float32 too, because steps of a learning
    rate are lost in 8 bits of mantissa; their modules get their input cast instead.

    Args:
        trained_whole: names of parameters that a device trains.
    """
    if dtype == torch.float32:
        return
    trained = {id(model.get_parameter(name)) for name in trained_whole}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in trained:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if any(id(parameter) in trained for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # torch's protocol
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
