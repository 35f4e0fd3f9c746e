"""The run file as one frozen tree of settings; `fedtune.config` reads it from a file.

Defaults live here and nowhere else. A section is what its stage needs to be told, so a stage takes
its own section or plain values, never the whole tree. Every key has a description: it is the
comment of `fedtune init` and the page `docs/run-file.md`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from fedtune.catalogue import CATALOGUE, section_values, unknown_device
from fedtune.records import (
    ChannelChoice,
    ComputeName,
    FormatName,
    GraphUse,
    ImportanceMethod,
    ScalingName,
    StartName,
    TaskName,
    WayName,
)

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


def parse_bytes(value: object) -> object:
    """Turn `"8 GB"` into 8000000000; anything that is not such a text passes unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", value)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"a size such as '8 GB' or '512 MiB' (units: {', '.join(_UNITS)})")
    return int(float(match[1]) * units[match[2].lower()])


def _split_text(value: object) -> object:
    """Turn `"q_proj, v_proj"` into two texts; anything that is not a text passes unchanged."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class RunSection(Section):
    """How long the run is and who takes part in a round."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="names the run folder; letters, digits, '.', '_' and '-'",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="fixes every random choice: sites, plan, batches"
    )
    rounds: int = Field(10, ge=1, description="times that the devices' adapters are joined")
    devices_per_round: int = Field(
        0, ge=0, description="devices that train in one round; 0: all of them"
    )
    minimum_devices: int = Field(1, ge=1, description="fewer reports than this fail the round")
    round_deadline_s: float = Field(
        3600.0,
        gt=0,
        description="seconds after which a round goes on without late devices; for each device in "
        "a simulation where they take turns",
    )


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
        if bool(self.train) == bool(self.sites):
            found = "both" if self.train else "neither"
            raise ValueError(
                f"expected exactly one of data.train and data.sites, found {found}; give one "
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

    targets: Annotated[tuple[str, ...], BeforeValidator(_split_text)] = Field(
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
    evaluate_every: int = Field(1, ge=0, description="rounds between held-out losses; 0: never")


class DeviceClassSection(Section):
    """One class of devices in the fleet, and how many there are."""

    count: int = Field(ge=1, description="devices of this class; each holds one site")
    device: str = Field(
        "",
        description="a device of the catalogue (`fedtune probe --catalogue`), for `memory`, "
        "`flops_per_s`, `memory_bandwidth`, `link` and `formats` where they are not set",
    )
    sites: Annotated[tuple[str, ...], BeforeValidator(_split_text)] = Field(
        (), description="sites that sit on this class; the others are dealt out by the seed"
    )
    memory: Bytes = Field(gt=0, description="budget of one training process on the device, bytes")
    flops_per_s: float = Field(
        1e10,
        gt=0,
        description="floating-point operations per second in the dtype that it computes in",
    )
    memory_bandwidth: Bytes = Field(10**10, gt=0, description="bytes per second")
    link: Bytes = Field(10**7, gt=0, description="bytes per second to and from the coordinator")
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(_split_text)] = Field(
        ("fp32", "bf16", "int8", "q4", "nf4"),
        min_length=1,
        description="backbone formats that the device may use",
    )
    upload: Bytes = Field(
        0, description="largest update that a device sends in a round, such as '5 MB'; 0: no limit"
    )
    rank_max: int = Field(0, ge=0, description="own limit of the rank; 0: lora.rank_max")
    rank: int = Field(0, ge=0, description="pin every matrix to this rank; 0: planned")
    format: FormatName | None = Field(
        None, description="pin the backbone's format; without this key: planned"
    )
    correction_rank: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="pin the rank of the frozen pair that repairs each matrix of 4 bits or fewer; "
        "without this key: planned",
    )
    micro_batch: int = Field(0, ge=0, description="pin the samples per forward pass; 0: planned")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: object) -> object:
        """What a section does not set itself, it has from its device.

        It happens before anything is checked, so that the effective configuration holds the figures
        themselves, and a run is the same when the catalogue has changed.
        """
        if not isinstance(values, dict) or not isinstance(values.get("device"), str):
            return values
        device = CATALOGUE.get(values["device"])
        return values if device is None else section_values(device) | values

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        if name and name not in CATALOGUE:
            raise ValueError(unknown_device(name))
        return name


class ImportanceSection(Section):
    """How the weights that matter are found before the fleet is planned."""

    method: ImportanceMethod = Field(
        "sensitivity",
        description="what the gain of a further rank is read from: |weight x gradient| "
        "(`sensitivity`), spectra of the gradient (`spectrum`), the inputs (`activation`), the "
        "sensitivity of singular triplets (`adalora`), nothing (`uniform`), or a draw (`random`)",
    )
    batches: int = Field(
        4, ge=1, description="batches of `train.batch_size` samples that a device measures on"
    )
    devices: int = Field(
        0, ge=0, description="devices that measure, drawn by the seed; 0: all of them"
    )
    file: str = Field(
        "",
        description="a report that an earlier run left (`importance.json`); empty: measured by "
        "the devices before round 1",
    )


class PlanSection(Section):
    """Limits and aims of the whole fleet's plan."""

    round_seconds: float = Field(
        0.0, ge=0, description="longest planned round in seconds; 0: no limit"
    )
    makespan_weight: float = Field(
        1.0,
        ge=0,
        description="how much a shorter round counts; a plan is chosen by gain to the power of "
        "`gain_weight` over seconds to the power of this; 0: only what is learned counts",
    )
    gain_weight: float = Field(
        2.0, ge=0, description="how much what the devices learn in a round counts; see above"
    )
    steps: Literal["planned", "equal"] = Field(
        "planned",
        description="`planned`: slow devices take fewer local steps; `equal`: all take "
        "`train.local_steps`, unless `round_seconds` forbids it",
    )
    max_bytes: Bytes = Field(
        0, description="largest update of any device in a round, such as '5 MB'; 0: no limit"
    )
    shortest_sequence: int = Field(
        0,
        ge=0,
        description="a device that cannot carry samples of `data.max_tokens` may cut them down "
        "to this many tokens; 0: it may not",
    )
    solver: Literal["milp", "greedy"] = Field(
        "milp",
        description="`milp`: a mixed-integer program refines the greedy plan within "
        "`solver_seconds`; `greedy`: the greedy plan",
    )
    solver_seconds: float = Field(
        20.0, gt=0, description="longest time that the whole fleet's programs may take"
    )
    file: str = Field(
        "", description="a plan to follow, as `fedtune plan` writes it (`--plan`); empty: planned"
    )
    replan: bool = Field(
        True, description="plan a device anew when its time or memory is not as planned"
    )
    replan_threshold: float = Field(
        0.25,
        gt=0,
        description="share by which measured seconds may differ from the plan's before it is "
        "made anew",
    )
    checkpointing: bool = Field(True, description="allow gradient checkpointing to save memory")
    widths: Literal["mixed", "uniform"] = Field(
        "mixed",
        description="`mixed`: memory that a backbone of 4 bits or fewer leaves buys single "
        "matrices a better form; `uniform`: all matrices of a device alike",
    )
    distortion: str = Field(
        "",
        description="for `mixed`: a table of what each matrix loses in each form, as `fedtune "
        "measure` writes it; empty: measured where the base is at hand, as in a simulation",
    )
    correction_rank: int = Field(
        8,
        ge=0,
        le=1024,
        description="for `mixed`: highest rank of the frozen pair that repairs a matrix on its "
        "device; 0: no pairs",
    )


class AggregateSection(Section):
    """How unequal adapters are joined."""

    rule: Literal["delta", "zero-pad", "flexlora", "flora"] = Field(
        "delta",
        description="`delta` joins differences exactly; the others are published baselines",
    )
    weights: Literal["samples", "tokens", "uniform"] = Field(
        "samples",
        description="what a device counts by: samples its site holds, tokens trained on, or all "
        "the same",
    )
    server_step: float = Field(1.0, gt=0, description="factor of each round's joined update")
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last update kept; 0: none")


class WireSection(Section):
    """How tensors travel."""

    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the adapters in messages; float16 halves the bytes"
    )


class SimulationSection(Section):
    """How `fedtune simulate` runs the fleet on this machine."""

    backend: Literal["inprocess", "ray"] = Field(
        "inprocess", description="`inprocess` needs nothing more; `ray` runs devices in parallel"
    )
    threads: int = Field(0, ge=0, description="torch threads per device; 0: all cores")
    workers: int = Field(1, ge=1, description="for `ray`: devices that train at the same time")
    devices_per_pass: int = Field(
        16,
        ge=1,
        le=1024,
        description="for `inprocess`: devices of like plans that train side by side in one pass; "
        "changes speed and memory, not the result; 1: one by one",
    )
    accelerator: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the simulated devices compute; their budgets stay their own"
    )
    clock: Literal["virtual", "measured"] = Field(
        "virtual",
        description="`virtual`: a device takes the seconds that its class predicts, and nothing "
        "is planned anew; `measured`: those that it takes on this machine",
    )


ExportName = Literal["merged", "peft", "onnx"]


class OutputsSection(Section):
    """What is left on disk."""

    folder: str = Field("", description="the run folder; empty: runs/<run.name>")
    exports: Annotated[tuple[ExportName, ...], BeforeValidator(_split_text)] = Field(
        get_args(ExportName), description="what is written when the run ends; [] for nothing"
    )
    keep_checkpoints: int = Field(3, ge=1, description="how many of the last rounds to keep")


class RunConfig(Section):
    """Everything that defines a run."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    fleet: dict[str, DeviceClassSection] = Field(min_length=1)
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    importance: ImportanceSection = ImportanceSection()
    plan: PlanSection = PlanSection()
    aggregate: AggregateSection = AggregateSection()
    wire: WireSection = WireSection()
    simulation: SimulationSection = SimulationSection()
    outputs: OutputsSection = OutputsSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._check_rule()
        self._check_optimizer()
        self._check_way()
        classifying = self.model.task == "sequence-classification"
        if classifying != (self.data.format == "text-label"):
            raise ValueError(
                "model.task 'sequence-classification' goes with data.format 'text-label', "
                f"and only with it; found {self.model.task!r} and {self.data.format!r}"
            )
        for key in ("devices_per_round", "minimum_devices"):
            wanted = getattr(self.run, key)
            if wanted > self.devices:
                raise ValueError(
                    f"run.{key} = {wanted}: expected at most {self.devices}, the devices in fleet"
                )
        asked = self.run.devices_per_round or self.devices
        if self.run.minimum_devices > asked:
            raise ValueError(
                f"run.minimum_devices = {self.run.minimum_devices}: expected at most "
                f"run.devices_per_round = {asked}"
            )
        for name, device_class in self.fleet.items():
            _check_pins(name, device_class, self.train.batch_size)
        return self

    def _check_rule(self) -> None:
        """Refuse what an aggregation rule cannot do, before anything runs."""
        plain = self.aggregate.server_step == 1.0 and self.aggregate.momentum == 0.0
        if self.aggregate.rule in ("zero-pad", "flora") and not plain:
            raise ValueError(
                f"aggregate.rule {self.aggregate.rule!r} goes with aggregate.server_step = 1 and "
                "aggregate.momentum = 0; use 'delta' for others"
            )
        if self.aggregate.rule == "zero-pad" and self.lora.rank_max > self.lora.rank_cap:
            raise ValueError(
                f"aggregate.rule 'zero-pad' needs lora.rank_max = {self.lora.rank_max} to be at "
                f"most lora.rank_cap = {self.lora.rank_cap}"
            )

    def _check_optimizer(self) -> None:
        """Refuse to keep a state that there is not, or that would be left behind."""
        if not self.train.keep_optimizer:
            return
        if self.train.optimizer != "adamw":
            raise ValueError(
                "train.keep_optimizer goes with train.optimizer = 'adamw', found "
                f"{self.train.optimizer!r}"
            )
        if self.simulation.backend == "ray":
            raise ValueError(
                "train.keep_optimizer goes with simulation.backend = 'inprocess': 'ray' moves "
                "devices between processes, and the optimiser's state would stay behind"
            )

    def _check_way(self) -> None:
        """Refuse ways to train that exclude each other, or that a rule cannot join."""
        rows = {"train.way": self.train.way == "s2ft", "lora.start": self.lora.start != "random"}
        if all(rows.values()):
            raise ValueError(
                f"train.way 's2ft' takes the place of lora.start = {self.lora.start!r}: both "
                "choose the fresh rows of A; leave lora.start at 'random'"
            )
        chosen = next((key for key, own in rows.items() if own), None)
        if chosen is not None and self.aggregate.rule == "zero-pad":
            value = self.train.way if chosen == "train.way" else self.lora.start
            raise ValueError(
                f"aggregate.rule 'zero-pad' averages A apart from B, and with {chosen} = {value!r} "
                "devices choose rows of A themselves; use 'delta'"
            )

    @property
    def devices(self) -> int:
        """Number of devices in the fleet."""
        return sum(c.count for c in self.fleet.values())

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.outputs.folder or f"runs/{self.run.name}")


def _check_pins(name: str, device_class: DeviceClassSection, batch_size: int) -> None:
    """Refuse pinned values that no plan could hold."""
    pinned = device_class.format
    if pinned is not None and pinned not in device_class.formats:
        raise ValueError(
            f"fleet.{name}.format = {pinned!r}: expected one of fleet.{name}.formats "
            f"({', '.join(device_class.formats)})"
        )
    if device_class.micro_batch and batch_size % device_class.micro_batch:
        raise ValueError(
            f"fleet.{name}.micro_batch = {device_class.micro_batch}: expected a divisor of "
            f"train.batch_size = {batch_size}"
        )
    if device_class.rank_max and device_class.rank > device_class.rank_max:
        raise ValueError(
            f"fleet.{name}.rank = {device_class.rank}: expected at most "
            f"fleet.{name}.rank_max = {device_class.rank_max}"
        )
