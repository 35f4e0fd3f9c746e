"""The run file: one frozen tree of settings, read once at the edge.

`load_run_config` is the only place that reads a run file. No component takes the tree itself;
each takes the plain values that it needs. Unknown keys and bad values are one-line errors that
name the file, the key, the value, what is allowed and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
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


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RunSection(_Section):
    """How long the run is and who takes part in a round."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    rounds: int = Field(10, ge=1)
    devices_per_round: int = Field(0, ge=0, description="0: all of them")
    minimum_devices: int = Field(1, ge=1, description="fewer reports than this fail the round")
    round_deadline_s: float = Field(3600.0, gt=0)


class ModelSection(_Section):
    """The base model: a folder in Hugging Face form, or a hub id."""

    path: str
    revision: str = "main"
    task: TaskName = "causal-lm"


class PartitionSection(_Section):
    """How one file is split over sites."""

    by: Literal["field", "iid", "dirichlet", "quantity"] = "iid"
    field: str = Field("client", description="for `field`: one site per value of this key")
    alpha: float = Field(
        0.5, gt=0, description="for `dirichlet` and `quantity`; smaller: less even"
    )
    label_field: str = Field("label", description="for `dirichlet`: the key that is skewed")
    largest: int = Field(0, ge=0, description="for `field`: keep only the largest sites; 0: all")


class DataSection(_Section):
    """Where the samples are and how a row becomes tokens."""

    train: str = Field("", description="one JSONL file, split by `partition`")
    sites: dict[str, str] = Field(default_factory=dict, description="site name -> its JSONL file")
    test: str = Field("", description="held-out JSONL file for the merged model; optional")
    test_stride: int = Field(1, ge=1, description="use every n-th row of `test`")
    held_out_fraction: float = Field(0.1, ge=0, lt=1, description="of each site, never trained on")
    format: Literal["prompt-response", "text", "messages", "text-label"] = "prompt-response"
    prompt_field: str = "prompt"
    response_field: str = "response"
    text_field: str = "text"
    messages_field: str = "messages"
    label_field: str = "label"
    prompt_template: str = Field("{prompt}\n", description="what is tokenised as the prompt")
    max_tokens: int = Field(256, ge=4)
    too_long: Literal["truncate", "drop"] = "truncate"
    partition: PartitionSection = PartitionSection()

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if bool(self.train) == bool(self.sites):
            raise ValueError("exactly one of data.train and data.sites")
        if "{prompt}" not in self.prompt_template:
            raise ValueError("data.prompt_template must contain {prompt}")
        return self


class LoraSection(_Section):
    """Which matrices are adapted and how large an adapter may grow."""

    targets: tuple[str, ...] = Field(
        ("all-linear",), description="`all-linear`, or ends of matrix names such as q_proj"
    )
    rank_max: int = Field(16, ge=1, le=1024, description="highest rank that a device trains")
    rank_cap: int = Field(32, ge=1, le=4096, description="rank that the coordinator keeps")
    scale: float = Field(1.0, gt=0, description="alpha / rank")


class TrainSection(_Section):
    """What a device does in a round."""

    local_steps: int = Field(5, ge=1)
    batch_size: int = Field(16, ge=1, description="samples per optimiser step, on every device")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(5e-3, gt=0)
    final_learning_rate_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="learning rate of the last round, as a share of the first's",
    )
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_gradient_norm: float = Field(1.0, ge=0, description="0: no clipping")
    evaluate_every: int = Field(1, ge=0, description="rounds between held-out losses; 0: never")


class DeviceClassSection(_Section):
    """One class of devices in the fleet, and how many there are."""

    count: int = Field(ge=1)
    memory: Bytes = Field(gt=0, description="budget of one training process on the device")
    flops_per_s: float = Field(1e10, gt=0)
    memory_bandwidth: Bytes = Field(10**10, gt=0, description="bytes a second")
    link: Bytes = Field(10**7, gt=0, description="bytes a second to the coordinator")
    formats: tuple[FormatName, ...] = Field(("fp32", "bf16", "int8", "nf4"), min_length=1)
    rank_max: int = Field(0, ge=0, description="own rank limit; 0: lora.rank_max")
    rank: int = Field(0, ge=0, description="pin every matrix to this rank; 0: planned")
    format: FormatName | None = Field(None, description="pin the backbone; default: planned")
    micro_batch: int = Field(0, ge=0, description="pin; 0: planned")


class PlanSection(_Section):
    """Limits of the whole fleet."""

    round_seconds: float = Field(0.0, ge=0, description="longest planned round; 0: no limit")
    checkpointing: bool = Field(True, description="allow gradient checkpointing to save memory")


class AggregateSection(_Section):
    """How unequal adapters are joined."""

    rule: Literal["delta", "zero-pad", "flexlora", "flora"] = "delta"
    weights: Literal["samples", "tokens", "uniform"] = "samples"
    server_step: float = Field(1.0, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)


class WireSection(_Section):
    """How tensors travel."""

    dtype: Literal["float32", "float16"] = "float32"


class SimulationSection(_Section):
    """How `fedtune simulate` runs the fleet on this machine."""

    backend: Literal["inprocess", "ray"] = "inprocess"
    threads: int = Field(0, ge=0, description="torch threads per device; 0: all cores")
    workers: int = Field(1, ge=1, description="for `ray`: devices that train at the same time")


ExportName = Literal["merged", "peft", "onnx"]


class OutputsSection(_Section):
    """What is left on disk."""

    folder: str = Field("", description="default: runs/<run.name>")
    exports: tuple[ExportName, ...] = get_args(ExportName)
    keep_checkpoints: int = Field(3, ge=1)


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
        classifying = self.model.task == "sequence-classification"
        if classifying != (self.data.format == "text-label"):
            raise ValueError(
                "model.task 'sequence-classification' goes with data.format 'text-label', "
                f"and only with it; found {self.model.task!r} and {self.data.format!r}"
            )
        return self

    @property
    def devices(self) -> int:
        """Number of devices in the fleet."""
        return sum(c.count for c in self.fleet.values())

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.outputs.folder or f"runs/{self.run.name}")


# ---------------------------------------------------------------- reading


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (`.toml`, or the `config.json` of a run folder) and apply overrides.

    Paths inside the file are relative to the file; paths in overrides to the working folder.

    Args:
        path: the run file.
        overrides: `section.key=value`, the value in TOML's form or a plain text.

    Raises:
        ConfigError: the file is missing, not TOML, or holds an unknown key or a bad value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run file {path} cannot be read ({error.strerror}); write one with: fedtune init"
        ) from None
    try:
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid {path.suffix[1:].upper() or 'TOML'}: {error}"
        ) from None
    _anchor_paths(tree, path.parent)
    for override in overrides:
        _apply_override(tree, override)
    return parse_run_config(tree, str(path))


def parse_run_config(tree: Mapping[str, object], source: str) -> RunConfig:
    """Validate a tree of plain values.

    Args:
        tree: sections of keys, as TOML gives them.
        source: what to call the tree in an error, usually a file name.

    Raises:
        ConfigError: an unknown key or a bad value; the message names the first.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(error.errors()[0], tree)}") from None


def _anchor_paths(tree: dict[str, object], folder: Path) -> None:
    """Make the data paths of a file relative to the file's folder, where they exist there."""

    def anchored(text: object) -> object:
        if isinstance(text, str) and text and (folder / text).exists():
            return str(folder / text)
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
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set needs section.key=value, got {override!r}")
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node = tree
    for part in parts[:-1]:
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
        node = below
    if parts[-1] == "train" and parts[:-1] == ["data"]:
        node.pop("sites", None)
    if parts[:-1] == ["data", "sites"]:
        node_data = tree["data"]
        assert isinstance(node_data, dict)
        node_data.pop("train", None)
    node[parts[-1]] = value


def _describe(error: ErrorDetails, tree: Mapping[str, object]) -> str:
    """One line for one pydantic error: key, value, what is allowed, nearest valid key."""
    location = tuple(str(part) for part in error["loc"])
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"missing key {key}; {_purpose(location)}"
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if location and isinstance(error["input"], dict):
        return f"{key}: expected {message}"
    return f"{key} = {error['input']!r}: expected {_expected(message)}"


def _expected(message: str) -> str:
    return message.removeprefix("Input should be ")


def _purpose(location: tuple[str, ...]) -> str:
    section = _section_at(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    if field is not None and field.description:
        return field.description
    return {
        "model": "add a [model] section with path",
        "data": "add a [data] section",
        "fleet": "add at least one [fleet.NAME] section",
    }.get(location[-1], "it has no default")


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


def _valid_keys(location: Sequence[str]) -> list[str]:
    section = _section_at(location)
    return list(section.model_fields) if section else []
