"""What a device process holds before it has a base: a budget is what training may use on top.

Libraries are loaded piece by piece: the classes of a model at its first use, the code of a kernel
when it is called. On Linux, with torch 2.13 for CPUs, the imports of a device take 270 MB, and a
first step of a tiny model another 175 MB, which no later step takes again.
"""

from __future__ import annotations

import gc
import threading
import time
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import nn

from fedtune.devices.usage import resident_bytes
from fedtune.errors import MissingExtraError
from fedtune.kernels.workspace import release_workspaces
from fedtune.lora.linear import AdaptedLinear
from fedtune.model.backbone import Backbone
from fedtune.model.blocks import fuse
from fedtune.quant.storage import store
from fedtune.records import DevicePlan, Dispatch, LoraFactors, MatrixForm, MatrixPlan
from fedtune.train.round import train_round
from fedtune.wire.messages import OptimizerSpec

SLACK_BYTES: Final = 16 << 20
"""What a round takes that is no tensor: the model's own objects, gaps in the heap, scratch of the
libraries. Measured over the plans of `benchmarks/plan_accuracy.py`: 7 to 17 MB."""

_TOKENS, _VOCABULARY, _RANK, _LAYERS = 16, 64, 2, 4
_STEPS = 6
_PASSES = 3
"""Of a block in a step, as `fedtune.plan.work.block_passes` counts them."""


def ready_bytes() -> int | None:
    """Memory of this process when it is ready for a plan, with `SLACK_BYTES` for what no plan
    counts; None where the system does not tell. Takes a second.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    settle()
    held = resident_bytes()
    return None if held is None else held + SLACK_BYTES


def settle() -> None:
    """Take a step of a tiny model, so that all that a first step loads is there.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    _tiny_round(1)
    gc.collect()


def call_seconds() -> float:
    """What the host takes to call a block's pass, whatever it computes: `CostCalibration`'s
    `block_seconds`, from the fastest of some steps of a tiny model.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    stamps: list[float] = []
    _tiny_round(_STEPS, stamps)
    fastest = min(after - before for before, after in pairwise(stamps))
    return fastest / (_LAYERS * _PASSES)


def _tiny_round(steps: int, stamps: list[float] | None = None) -> None:
    """Train a tiny model; `stamps` gets the time after each step."""
    backbone = _tiny_backbone()
    rng = np.random.default_rng(0)
    sent = {
        name: LoraFactors(
            rng.standard_normal((_RANK, layer.in_features), dtype=np.float32),
            np.zeros((layer.out_features, _RANK), dtype=np.float32),
        )
        for name, layer in backbone.layers.items()
    }
    matrices = tuple(MatrixPlan(name, _RANK, "nf4") for name in sent)
    plan = DevicePlan("", matrices, 1, 1, _TOKENS, steps)

    def stamp(*_: object) -> None:
        if stamps is not None:
            stamps.append(time.perf_counter())

    train_round(
        backbone,
        [[_Sample()]] * steps,
        Dispatch(sent),
        plan,
        OptimizerSpec(),
        task="causal-lm",
        pad_id=0,
        after_step=stamp,
    )
    release_workspaces()


class _Sample:
    """A sample of some tokens, all of which carry loss."""

    tokens = np.arange(_TOKENS, dtype=np.int32)
    loss_mask = np.ones(_TOKENS, dtype=np.bool_)
    label = -1


def _tiny_backbone() -> Backbone:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtraError("transformers", "train", "a first training step") from None
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2,
        vocab_size=_VOCABULARY,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            layers[name] = AdaptedLinear(store(module.weight, MatrixForm("nf4")), None)
            model.set_submodule(name, layers[name])
    model.requires_grad_(False)
    fuse(model)
    return Backbone(model.eval(), layers, threading.Lock())
