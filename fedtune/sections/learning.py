"""Sections on what is learned: the base, the data, the adapters, and a local step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedtune.records import (
    ChannelChoice,
    ComputeName,
    GraphUse,
    ScalingName,
    StartName,
    TaskName,
    WayName,
)
from fedtune.sections.section import Section, split_text


class ModelSection(Section):
    """The base model, which no round changes."""

    path: str = Field(
        min_length=1, description="folder in Hugging Face form (safetensors), or a hub id"
    )
    revision: str = Field("main", description="branch, tag or commit of a hub id")
    task: TaskName = Field("causal-lm", description="what the model learns to do")


class PartitionSection(Section):
    """How the one file `data.train` is split over sites."""

    by: Literal["field", "iid", "dirichlet", "quantity"] = Field(
        "iid",
        description="`field`: one site per value of a key; `iid`: evenly at random; "
        "`dirichlet`: skewed labels; `quantity`: skewed sizes",
    )
    field: str = Field("client", description="for `field`: one site per value of this key")
    alpha: float = Field(
        0.5, gt=0, le=1e6, description="for `dirichlet` and `quantity`; smaller: less even"
    )
    label_field: str = Field("label", description="for `dirichlet`: the key that is skewed")
    largest: int = Field(
        0, ge=0, description="for `field`: how many of the largest sites to keep; 0: all"
    )


class DataSection(Section):
    """Where the samples are and how a row becomes tokens."""

    train: str = Field(
        "", description="one JSONL file, split by `partition`; either this or `sites`"
    )
    sites: dict[str, str] = Field(
        default_factory=dict, description="site name -> its own JSONL file; either this or `train`"
    )
    test: str = Field("", description="held-out JSONL file for the merged model; optional")
    test_stride: int = Field(1, ge=1, description="use every n-th row of `test`")
    held_out_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of each site's rows that is never trained on"
    )
    format: Literal["prompt-response", "text", "messages", "text-label"] = Field(
        "prompt-response",
        description="what a row holds: loss falls on the response, on all text, on the "
        "assistant's turns, or on the label",
    )
    prompt_field: str = Field("prompt", description="for `prompt-response`: key of the prompt")
    response_field: str = Field(
        "response", description="for `prompt-response`: key of the response"
    )
    text_field: str = Field("text", description="for `text` and `text-label`: key of the text")
    messages_field: str = Field(
        "messages", description="for `messages`: key of the list of {role, content}"
    )
    label_field: str = Field("label", description="for `text-label`: key of the class")
    prompt_template: str = Field("{prompt}\n", description="what is tokenised as the prompt")
    max_tokens: int = Field(256, ge=4, description="longest sample in tokens")
    too_long: Literal["truncate", "drop"] = Field(
        "truncate", description="what happens to a sample of more than `max_tokens`"
    )
    partition: PartitionSection = PartitionSection()

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.train and self.sites:
            raise ValueError(
                "expected exactly one of data.train and data.sites, found both; give one "
                "file to split, or one file per site"
            )
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"data.prompt_template = {self.prompt_template!r}: expected a text that contains "
                "{prompt}"
            )
        return self


class LoraSection(Section):
    """Which matrices are adapted and how large an adapter may grow."""

    targets: Annotated[tuple[str, ...], BeforeValidator(split_text)] = Field(
        ("all-linear",),
        min_length=1,
        description="`all-linear`, or ends of matrix names such as q_proj",
    )
    rank_max: int = Field(16, ge=1, le=1024, description="highest rank that a device trains")
    rank_cap: int = Field(32, ge=1, le=4096, description="rank that the coordinator keeps")
    tail_rank: int = Field(
        4096,
        ge=0,
        le=4096,
        description="frozen directions of the joined adapter that a device computes with, beside "
        "those it trains; 0: none",
    )
    scale: float = Field(1.0, gt=0, description="factor of every update, alpha / rank")
    scaling: ScalingName = Field(
        "constant",
        description="`constant`: `scale` at every rank; `rank-stabilised`: `scale` over the root "
        "of the rank (rsLoRA)",
    )
    start: StartName = Field(
        "random",
        description="where directions that start at zero point: at random, along the layer's "
        "inputs (`eva`), its weights (`pissa`), or both (`corda`)",
    )


class TrainSection(Section):
    """What a device does in a round."""

    way: WayName = Field(
        "lora",
        description="what of the factors is trained, and at which rate; docs/training.md compares "
        "them",
    )
    layer_rate_decay: float = Field(
        1.0,
        ge=1e-3,
        le=1,
        description="factor of the learning rate from one block to the one below it; 1: all alike",
    )
    flops_share: float = Field(
        0.5,
        ge=1e-6,
        le=1,
        description="for `greentrainer`: operations of a backward pass, as a share of those that "
        "training every matrix takes",
    )
    allora_eta: float = Field(
        1.0,
        ge=1e-3,
        le=1e3,
        description="for `allora`: factor of the learning rate of a row of B that is zero",
    )
    channels: ChannelChoice = Field(
        "random",
        description="for `s2ft`: input channels that are trained, drawn by the seed or of the "
        "largest weights or inputs",
    )
    local_steps: int = Field(5, ge=1, description="optimiser steps per device and round")
    batch_size: int = Field(16, ge=1, description="samples per optimiser step, on every device")
    optimizer: Literal["adamw", "adamw-8bit", "sgd"] = Field(
        "adamw", description="rule of a local step; `adamw-8bit` needs bitsandbytes"
    )
    keep_optimizer: bool = Field(
        False,
        description="start each round from what the device's last one left of AdamW's squares; "
        "for `adamw` and the `inprocess` backend",
    )
    compute: ComputeName = Field(
        "auto",
        description="dtype of activations and products; `auto` is measured on the device, and "
        "`fp32` in a simulation, so that a seed gives one result on every machine",
    )
    cuda_graph: GraphUse = Field(
        "auto",
        description="record training steps on a GPU as CUDA graphs and replay them; `auto`: where "
        "it can be done and memory is plenty, for micro-batches whose form comes again; `on`: all, "
        "or refuse",
    )
    tune_allocator: bool = Field(
        True, description="keep freed memory in a training process for its next step (glibc)"
    )
    learning_rate: float = Field(
        1e-3,
        gt=0,
        description="of a step in the first round; about 2e-4 for billions of parameters, 1e-2 "
        "for tiny models",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls from the first round to the last"
    )
    final_learning_rate_share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="learning rate at the end of the run, as a share of the first; not used by a "
        "constant schedule",
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, per step")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean; SGD's momentum")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the squares")
    max_gradient_norm: float = Field(
        1.0, ge=0, description="longer gradients are clipped to this norm; 0: no clipping"
    )
    proximal: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="pull of each step back to what the round started from (FedProx's mu); 0: none",
    )
    evaluate_every: int = Field(1, ge=0, description="rounds between held-out losses; 0: never")
