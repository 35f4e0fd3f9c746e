"""The run file: one frozen tree of settings, read once at the edge.

`load_run_config` is the only place that reads a run file. No component takes the tree itself;
each takes the plain values that it needs. Unknown keys and bad values are one-line errors that
name the file, the key, the value, what is allowed and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from fedtune.errors import ConfigError
from fedtune.records import FormatName, TaskName

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


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class RunSection(_Section):
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


class ModelSection(_Section):
    """The base model, which no round changes."""

    path: str = Field(
        min_length=1, description="folder in Hugging Face form (safetensors), or a hub id"
    )
    revision: str = Field("main", description="branch, tag or commit of a hub id")
    task: TaskName = Field("causal-lm", description="what the model learns to do")


class PartitionSection(_Section):
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


class DataSection(_Section):
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


class LoraSection(_Section):
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


class TrainSection(_Section):
    """What a device does in a round."""

    local_steps: int = Field(5, ge=1, description="optimiser steps per device and round")
    batch_size: int = Field(16, ge=1, description="samples per optimiser step, on every device")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="rule of a local step")
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


class DeviceClassSection(_Section):
    """One class of devices in the fleet, and how many there are."""

    count: int = Field(ge=1, description="devices of this class; each holds one site")
    sites: Annotated[tuple[str, ...], BeforeValidator(_split_text)] = Field(
        (), description="sites that sit on this class; the others are dealt out by the seed"
    )
    memory: Bytes = Field(gt=0, description="budget of one training process on the device, bytes")
    flops_per_s: float = Field(1e10, gt=0, description="floating-point operations per second")
    memory_bandwidth: Bytes = Field(10**10, gt=0, description="bytes per second")
    link: Bytes = Field(10**7, gt=0, description="bytes per second to and from the coordinator")
    formats: Annotated[tuple[FormatName, ...], BeforeValidator(_split_text)] = Field(
        ("fp32", "bf16", "int8", "nf4"),
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
    micro_batch: int = Field(0, ge=0, description="pin the samples per forward pass; 0: planned")


class PlanSection(_Section):
    """Limits of the whole fleet."""

    round_seconds: float = Field(
        0.0, ge=0, description="longest planned round in seconds; 0: no limit"
    )
    checkpointing: bool = Field(True, description="allow gradient checkpointing to save memory")


class AggregateSection(_Section):
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


class WireSection(_Section):
    """How tensors travel."""

    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the adapters in messages; float16 halves the bytes"
    )


class SimulationSection(_Section):
    """How `fedtune simulate` runs the fleet on this machine."""

    backend: Literal["inprocess", "ray"] = Field(
        "inprocess", description="`inprocess` needs nothing more; `ray` runs devices in parallel"
    )
    threads: int = Field(0, ge=0, description="torch threads per device; 0: all cores")
    workers: int = Field(1, ge=1, description="for `ray`: devices that train at the same time")
    accelerator: Literal["cpu", "cuda"] = Field(
        "cpu", description="where the simulated devices compute; their budgets stay their own"
    )


ExportName = Literal["merged", "peft", "onnx"]


class OutputsSection(_Section):
    """What is left on disk."""

    folder: str = Field("", description="the run folder; empty: runs/<run.name>")
    exports: Annotated[tuple[ExportName, ...], BeforeValidator(_split_text)] = Field(
        get_args(ExportName), description="what is written when the run ends; [] for nothing"
    )
    keep_checkpoints: int = Field(3, ge=1, description="how many of the last rounds to keep")


class RunConfig(_Section):
    """Everything that defines a run."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    fleet: dict[str, DeviceClassSection] = Field(min_length=1)
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    plan: PlanSection = PlanSection()
    aggregate: AggregateSection = AggregateSection()
    wire: WireSection = WireSection()
    simulation: SimulationSection = SimulationSection()
    outputs: OutputsSection = OutputsSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._check_rule()
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


# ---------------------------------------------------------------- reading


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (`.toml`, or the `config.json` of a run folder) and apply overrides.

    Paths inside the file are relative to the file's folder where something is there, else to the
    working folder; paths in overrides to the working folder.

    Args:
        path: the run file.
        overrides: `section.key=value`, the value in TOML's form or a plain text.

    Raises:
        ConfigError: the file is missing, not TOML, or holds an unknown key or a bad value.
    """
    tree = _read_tree(path)
    _anchor_paths(tree, path.parent)
    for override in overrides:
        _apply_override(tree, override)
    keys = tuple(override.partition("=")[0].strip() for override in overrides)
    return _validate(tree, str(path), keys)


def parse_run_config(tree: Mapping[str, object], source: str) -> RunConfig:
    """Validate a tree of plain values.

    Args:
        tree: sections of keys, as TOML gives them.
        source: what to call the tree in an error, usually a file name.

    Raises:
        ConfigError: an unknown key or a bad value; the message names the first.
    """
    return _validate(tree, source, ())


def _validate(tree: Mapping[str, object], source: str, overridden: Sequence[str]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        blamed = "--set" if key and key in overridden else source
        raise ConfigError(_one_line(f"{blamed}: {_describe(first)}")) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_tree(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"run file {path} cannot be read ({error.strerror}); write one with: fedtune init"
        ) from None
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        tree = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(_one_line(f"{path} is not valid {form}: {error}")) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object of sections, found a {_kind(tree)}")
    return tree


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _anchor_paths(tree: dict[str, object], folder: Path) -> None:
    """Make what a file names beside itself absolute, so that it holds from anywhere."""

    def anchored(text: object) -> object:
        if isinstance(text, str) and text and os.path.exists(folder / text):
            return str((folder / text).resolve())
        return text

    data, model = tree.get("data"), tree.get("model")
    if isinstance(data, dict):
        for key in ("train", "test"):
            if key in data:
                data[key] = anchored(data[key])
        if isinstance(data.get("sites"), dict):
            data["sites"] = {name: anchored(value) for name, value in data["sites"].items()}
    if isinstance(model, dict) and "path" in model:
        model["path"] = anchored(model["path"])


def _apply_override(tree: dict[str, object], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"--set needs section.key=value, got {override!r}")
    node = tree
    for depth, part in enumerate(parts[:-1], start=1):
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(
                f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section"
            )
        node = below
    # The two sources of data exclude each other; naming one on the command line drops the other.
    data = tree.get("data")
    if isinstance(data, dict) and parts[0] == "data" and len(parts) > 1:
        dropped = {"train": "sites", "sites": "train"}.get(parts[1])
        if dropped is not None:
            data.pop(dropped, None)
    node[parts[-1]] = _override_value(parts, text.strip())


def _override_value(parts: Sequence[str], text: str) -> object:
    """Read a value in TOML's form; a plain text where that fails or where a text is wanted."""
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    section = _section_at(parts[:-1])
    field = section.model_fields.get(parts[-1]) if section else None
    wants_text = field is not None and field.annotation is str
    return text if wants_text and not isinstance(value, str) else value


def cache_folder() -> Path:
    """Where files that can be made again are kept, such as the demo's base model.

    `FEDTUNE_CACHE` where it is set, else the platform's folder for a user's caches.
    """
    chosen = os.environ.get("FEDTUNE_CACHE", "")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "fedtune" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedtune"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "fedtune"


# ---------------------------------------------------------------- refusing


def _describe(error: ErrorDetails) -> str:
    """One line for one pydantic error: key, value, what is allowed, nearest valid key."""
    location = tuple(str(part) for part in error["loc"])
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; {_hint(location)}"
    if error["type"] == "missing":
        return f"missing key {key}; {_purpose(location)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], dict):
        return message
    value = repr(error["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    return f"{key} = {value}: expected {_expected(error, message)}"


def _expected(error: ErrorDetails, message: str) -> str:
    kind = error["type"]
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"a section, written as [{'.'.join(str(part) for part in error['loc'])}]"
    if kind in ("tuple_type", "list_type"):
        return "a list, or a text with commas"
    if kind in ("too_short", "string_too_short"):
        return f"at least {error['ctx']['min_length']} of them" if kind == "too_short" else "a text"
    if kind == "string_pattern_mismatch":
        return "letters, digits, '.', '_' and '-', of which a letter or digit first"
    if kind == "string_type":
        return "a text"
    message = message.removeprefix("Input should be ")
    return f"a value {message}" if message.startswith(("greater", "less")) else message


def _hint(location: tuple[str, ...]) -> str:
    """The nearest valid key, the section that the key belongs to, or all valid keys."""
    name = location[-1]
    section = _section_at(location[:-1])
    valid = list(section.model_fields) if section else []
    near = difflib.get_close_matches(name.replace("-", "_"), valid, n=1, cutoff=0.6)
    elsewhere = [f"{path}.{name}" for path, keys in _sections() if name in keys]
    if near and not (elsewhere and section is RunConfig):
        return f"did you mean {near[0]}?"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"valid keys: {', '.join(valid)}"


def _purpose(location: tuple[str, ...]) -> str:
    section = _section_at(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    if field is not None and field.description:
        return field.description
    return {
        "model": "add a [model] section with path",
        "data": "add a [data] section with train or sites",
        "fleet": "add at least one [fleet.NAME] section with count and memory",
    }.get(location[-1], "it has no default")


def _sections() -> Iterator[tuple[str, list[str]]]:
    """Every section that holds plain keys, with them."""
    for name, field in RunConfig.model_fields.items():
        section = DeviceClassSection if name == "fleet" else field.annotation
        assert isinstance(section, type)
        assert issubclass(section, _Section)
        yield ("fleet.NAME" if name == "fleet" else name), list(section.model_fields)
    yield "data.partition", list(PartitionSection.model_fields)


def _section_at(location: Sequence[str]) -> type[_Section] | None:
    """The section class that a key path leads to."""
    section: type[_Section] = RunConfig
    parts = list(location)
    while parts:
        part = parts.pop(0)
        if section is RunConfig and part == "fleet":
            if not parts:
                return None
            parts.pop(0)
            section = DeviceClassSection
            continue
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return None
        if not issubclass(field.annotation, _Section):
            return None
        section = field.annotation
    return section
