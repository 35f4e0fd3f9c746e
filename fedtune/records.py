"""The records that cross from one stage to the next: frozen, checked, and free of torch.

The order is that of the flow: what a model is, what a device is, what a device shall do, what is
sent to it, what it sends back, and what the coordinator makes of it. Arrays are numpy float32
unless a field says otherwise; a matrix W maps `in_features` to `out_features` and is stored
`(out_features, in_features)`, as `torch.nn.Linear` stores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.floating]
TaskName: TypeAlias = Literal["causal-lm", "sequence-classification"]
FormatName: TypeAlias = Literal[
    "fp32",
    "bf16",
    "fp16",
    "q8",
    "int8",
    "q4",
    "nf4",
    "q3",
    "q2",
    "bnb-int8",
    "bnb-nf4",
]
"""How a frozen matrix is held: in floats, in blocks of 2 to 8 bits per weight with
double-quantised scales (`nf4`: QLoRA's levels; `q2` to `q8`: the better of two codebooks), in
8-bit integers with a scale per row, or as bitsandbytes holds it. Their order is the one in which a
plan tries them."""

ComputeName: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
"""In which dtype a device multiplies; `auto` is measured there."""

WayName: TypeAlias = Literal["lora", "allora", "s2ft", "greentrainer"]
"""How a device trains its factors; `docs/training.md` has a table of what each changes."""
StartName: TypeAlias = Literal["random", "eva", "corda", "pissa"]
"""Where a device's fresh directions point: as they were sent, or as its inputs or weights say."""
ChannelChoice: TypeAlias = Literal["random", "weight", "activation"]
"""Which input channels S2FT trains: drawn by the run's seed, or those of the largest norm."""
ScalingName: TypeAlias = Literal["constant", "rank-stabilised"]
"""How the factor of an update depends on its rank."""
ImportanceMethod: TypeAlias = Literal[
    "spectrum", "sensitivity", "activation", "adalora", "uniform", "random"
]
"""What the gain of each further rank of a matrix is read from; `docs/importance.md` compares
them."""
GraphUse: TypeAlias = Literal["auto", "on", "off"]
"""Whether a device records its training step as CUDA graphs."""

BACKBONE_FORMATS: tuple[FormatName, ...] = get_args(FormatName)
"""All formats in the order in which they are tried: our own, best first, then bitsandbytes'."""

BLOCK_BITS: Mapping[FormatName, int] = {"q8": 8, "q4": 4, "nf4": 4, "q3": 3, "q2": 2}
"""Bits per weight of the formats whose weights share a scale by blocks."""
DEFAULT_BLOCK = 64
"""Weights that share a scale where a form names no block (QLoRA, arXiv 2305.14314, section 3)."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """One weight matrix that may be adapted.

    Attributes:
        name: parameter path in the base's safetensors header, without the `.weight` at its end.
        layer: index of the transformer block that holds it, from 0.
    """

    name: str
    out_features: int
    in_features: int
    layer: int

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """What the coordinator knows of the base model: its shapes, never its weights.

    Attributes:
        digest: sha256 over the config and every shard's safetensors header and content; empty
            where no weights were read, as for a plan on paper.
        other_parameters: parameters that are not in `matrices` (embeddings, norms, biases).
        headers: sha256 over the config and every shard's safetensors header: bases of one such
            digest have one plan.
    """

    digest: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int
    vocabulary: int
    matrices: tuple[MatrixShape, ...]
    other_parameters: int
    headers: str = ""

    def __post_init__(self) -> None:
        names = [m.name for m in self.matrices]
        _require(len(names) == len(set(names)), "matrix names must be unique")

    def by_name(self) -> dict[str, MatrixShape]:
        return {m.name: m for m in self.matrices}


# ---------------------------------------------------------------- the device


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device can carry, as it reports it before the first round.

    Attributes:
        name: the site's own name; stable over rounds and restarts.
        device_class: name of the class in the run's fleet table, or of the catalogue.
        memory_bytes: what training may use in host memory, beyond the idle process.
        accelerator: `cpu` or `cuda`.
        matmul_flops_per_s: by dtype name (`fp32`, `bf16`, `fp16`).
        formats: backbone formats that run on the device.
        versions: package name -> version.
        compute: the dtype that `train.compute = "auto"` picks there; `auto` where it is not known.
    """

    name: str
    device_class: str
    cpu_threads: int
    memory_bytes: int
    accelerator: str = "cpu"
    accelerator_memory_bytes: int = 0
    matmul_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    memory_bandwidth_bytes_per_s: float = 0.0
    link_bytes_per_s: float = 0.0
    formats: tuple[FormatName, ...] = ("fp32",)
    versions: Mapping[str, str] = field(default_factory=dict)
    compute: ComputeName = "auto"

    def __post_init__(self) -> None:
        _require(bool(self.name), "a device needs a name")
        _require(self.memory_bytes > 0, f"memory_bytes of {self.name} must be positive")
        _require(bool(self.formats), f"device {self.name} must support a backbone format")
        for format_name in self.formats:
            _require(format_name in BACKBONE_FORMATS, f"unknown backbone format {format_name!r}")

    @property
    def budget_bytes(self) -> int:
        """Memory of the place where training happens."""
        return self.accelerator_memory_bytes if self.accelerator != "cpu" else self.memory_bytes


@dataclass(frozen=True, slots=True)
class SiteReport:
    """A device's answer to the profile query: itself, its data in numbers, its copy of the base.

    Attributes:
        dense: name -> shape of each parameter that is trained whole (a task head).
        labels: class names found in the site's data, sorted; empty unless classifying.
        warnings: what a person should know of the site's data, one line each.
        devices: that the site stands for, if it is their coordinator; its numbers are their sums.
    """

    profile: DeviceProfile
    base_digest: str
    train_samples: int
    held_out_samples: int
    train_tokens: int
    dense: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    devices: int = 1


@dataclass(frozen=True, slots=True)
class ImportanceReport:
    """How much each further rank of each matrix gains.

    Attributes:
        gain_per_rank: matrix name -> non-increasing gains of rank 1, 2, ...; any positive unit.
        tokens: how many tokens the numbers rest on; 0 for a prior.
        method: how they were found.
    """

    gain_per_rank: Mapping[str, tuple[float, ...]]
    tokens: int = 0
    method: ImportanceMethod = "uniform"


@dataclass(frozen=True, slots=True)
class CostCalibration:
    """What one measured step of a device class says of its closed-form predictions.

    Attributes:
        seconds_factor: measured seconds of a step over the predicted.
        bytes_factor: measured peak bytes beyond the idle process over the predicted.
        block_seconds: what the host takes to call a block's pass, whatever it computes; part of
            the prediction that `seconds_factor` multiplies.
    """

    seconds_factor: float = 1.0
    bytes_factor: float = 1.0
    block_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds_factor", "bytes_factor"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0, f"{name} must be a positive number, got {value}"
            )
        _require(
            0 <= self.block_seconds < math.inf,
            f"block_seconds must not be negative, got {self.block_seconds}",
        )


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True, order=True)
class MatrixForm:
    """How one frozen matrix is held on a device; see `MatrixPlan` for the fields."""

    format: FormatName
    block_size: int = 0
    correction_rank: int = 0


@dataclass(frozen=True, slots=True)
class DistortionTable:
    """What each matrix of a base loses in each form, measured once by whoever holds the base.

    Attributes:
        errors: matrix name -> sum of squared errors, one per form, after correction; infinite
            where the matrix cannot have the form (a correction of more than its rank).
        weighting: what an error counts by: `none`, or the name of the statistics that were used.
    """

    base_digest: str
    forms: tuple[MatrixForm, ...]
    errors: Mapping[str, tuple[float, ...]]
    weighting: str = "none"

    def __post_init__(self) -> None:
        _require(bool(self.forms), "a distortion table needs a form")
        _require(len(set(self.forms)) == len(self.forms), "forms of a distortion table are unique")
        for name, errors in self.errors.items():
            _require(
                len(errors) == len(self.forms),
                f"{name} has {len(errors)} errors for {len(self.forms)} forms",
            )
            _require(
                all(error >= 0 for error in errors), f"an error of {name} is negative or no number"
            )


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """What one device does with one matrix.

    Attributes:
        rank: trained LoRA rank; 0 means that the matrix stays frozen.
        tail_rank: how many further directions of the global adapter the device gets frozen.
        block_size: weights that share one quantisation scale; 0: 64 for formats with blocks.
        correction_rank: rank of the frozen pair that repairs the format's own error on this
            device; 0: none. It never travels.
    """

    name: str
    rank: int
    format: FormatName
    tail_rank: int = 0
    block_size: int = 0
    correction_rank: int = 0

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"rank of {self.name} must not be negative")
        _require(self.tail_rank >= 0, f"tail rank of {self.name} must not be negative")
        _require(self.correction_rank >= 0, f"correction rank of {self.name} must not be negative")
        _require(self.format in BACKBONE_FORMATS, f"unknown backbone format {self.format!r}")

    @property
    def form(self) -> MatrixForm:
        """How the matrix is held, without what is trained of it."""
        return MatrixForm(self.format, self.block_size, self.correction_rank)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What one device does in a round, and what that is predicted to cost it.

    Attributes:
        micro_batch: samples in one forward pass; `batch_size` is a multiple of it.
        batch_size: samples in one optimiser step (gradients accumulate over micro-batches).
        sequence_length: longest sample in tokens.
        first_trained_layer: backpropagation stops below this transformer block.
        binding: which limit decided, in words.
    """

    device: str
    matrices: tuple[MatrixPlan, ...]
    micro_batch: int
    batch_size: int
    sequence_length: int
    local_steps: int
    checkpointing: bool = False
    first_trained_layer: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    download_bytes: int = 0
    upload_bytes: int = 0
    binding: str = ""

    def __post_init__(self) -> None:
        _require(self.micro_batch >= 1, "micro_batch must be at least 1")
        _require(
            self.batch_size % self.micro_batch == 0,
            f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}",
        )
        _require(self.local_steps >= 1, "local_steps must be at least 1")

    def ranks(self) -> dict[str, int]:
        """Trained rank of every matrix that is trained."""
        return {m.name: m.rank for m in self.matrices if m.rank > 0}


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """One plan per device, in the order of the devices' names."""

    devices: tuple[DevicePlan, ...]

    def by_device(self) -> dict[str, DevicePlan]:
        return {plan.device: plan for plan in self.devices}


# ---------------------------------------------------------------- what travels


@dataclass(frozen=True, slots=True)
class LoraScale:
    """The factor of a LoRA pair by its trained rank: coordinator and device both derive it here.

    Attributes:
        value: alpha / rank of every pair, or alpha if it is `rank-stabilised`.

    Source:
        rsLoRA (arXiv 2312.03732, theorem 3.2): alpha / sqrt(rank) keeps the size of what a pair
        learns the same at every rank; alpha / rank lets it vanish as ranks grow.
    """

    value: float = 1.0
    scaling: ScalingName = "constant"

    def of(self, rank: int) -> float:
        """The factor at a trained rank; at rank 0, where there is only a frozen tail, `value`."""
        if self.scaling == "constant":
            return self.value
        return self.value / math.sqrt(max(rank, 1))


Scale: TypeAlias = float | LoraScale
"""One factor for every rank, or a factor by rank."""


def scale_of(scale: Scale, rank: int) -> float:
    """The factor of a pair whose trained rank is `rank`."""
    return scale.of(rank) if isinstance(scale, LoraScale) else scale


@dataclass(frozen=True, slots=True)
class TrainingWay:
    """How a device trains in a round, beside its optimiser.

    Attributes:
        start: where fresh directions point. Their columns of B are zero, so what the device starts
            with is what it was sent, whichever it is.
        layer_rate_decay: factor of the learning rate from one block to the one below it.
        flops_share: for `greentrainer`: operations of a step's backward pass, as a share of
            those that training every sent matrix takes.
        allora_eta: for `allora`: factor of the learning rate of a row of B that is zero.
        channels: for `s2ft`.
        seed: of random channels and of randomised factorisations; the same for all devices.
    """

    name: WayName = "lora"
    start: StartName = "random"
    layer_rate_decay: float = 1.0
    flops_share: float = 1.0
    allora_eta: float = 1.0
    channels: ChannelChoice = "random"
    seed: int = 0

    @property
    def shares_a_pass(self) -> bool:
        """Whether simulated devices can train side by side: all happens in the optimiser."""
        return self.name in ("lora", "allora") and self.start == "random"


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One low-rank update `scale * b @ a` of one matrix: b (out, rank), a (rank, in)."""

    a: FloatArray
    b: FloatArray
    scale: float = 1.0

    def __post_init__(self) -> None:
        _require(self.a.ndim == 2 and self.b.ndim == 2, "LoRA factors must be matrices")
        _require(
            self.a.shape[0] == self.b.shape[1],
            f"LoRA factors must share their rank, got a {self.a.shape} and b {self.b.shape}",
        )

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def product(self) -> NDArray[np.float64]:
        """The dense update (out, in), in float64; for tests and small matrices only."""
        return self.scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The tensors that the coordinator sends to one device at the start of a round.

    Attributes:
        trained: factors that the device starts its training from.
        tail: factors that the device adds to its frozen backbone for this round.
        dense: values of the parameters that are trained whole.
    """

    trained: Mapping[str, LoraFactors]
    tail: Mapping[str, LoraFactors] = field(default_factory=dict)
    dense: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterUpdate:
    """What a device returns from a round; bytes from a device are hostile until checked.

    Attributes:
        samples: training samples that the round's steps consumed.
        tokens: tokens that carried loss.
        metrics: named numbers (losses before and after, seconds, peak bytes).
        devices: whose updates are in it, where it comes from their coordinator.
        held_samples: training samples that those devices hold; 0: what the site said.
    """

    run: str
    round: int
    device: str
    base_digest: str
    factors: Mapping[str, LoraFactors]
    dense: Mapping[str, FloatArray]
    samples: int
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    devices: int = 1
    held_samples: int = 0


@dataclass(frozen=True, slots=True)
class Contribution:
    """One accepted update, beside what its device was sent and how much it counts.

    Attributes:
        weight: not yet normalised; positive.
        sent: exactly what the device started from, after rounding to the wire's dtype.
        factor: what its difference is multiplied by beside its normalised weight, 0..1: below 1
            where it is late or longer than allowed.
    """

    weight: float
    sent: Dispatch
    update: AdapterUpdate
    factor: float = 1.0


# ---------------------------------------------------------------- the coordinator's state


@dataclass(frozen=True, slots=True)
class LowRank:
    """`u @ diag(sigma) @ v.T`: u (out, R), sigma (R,) non-increasing, v (in, R).

    u and v have orthonormal columns, except under the `zero-pad` rule, which keeps plain factors
    there (b and a.T) with every sigma 1.
    """

    u: FloatArray
    sigma: FloatArray
    v: FloatArray

    def __post_init__(self) -> None:
        rank = self.sigma.shape[0]
        _require(
            self.u.shape[1] == rank and self.v.shape[1] == rank,
            f"u, sigma and v must share their rank, got {self.u.shape}, {self.sigma.shape}, "
            f"{self.v.shape}",
        )

    @property
    def rank(self) -> int:
        return int(self.sigma.shape[0])

    def product(self) -> NDArray[np.float64]:
        """The dense update (out, in), in float64; for tests and small matrices only."""
        return (self.u.astype(np.float64) * self.sigma) @ self.v.astype(np.float64).T


@dataclass(frozen=True, slots=True)
class GlobalAdapter:
    """The joined adapter after a round.

    Attributes:
        round: last round that was joined; 0 before the first.
        matrices: matrix name -> its low-rank update.
        dense: values of the parameters that are trained whole.
        dropped_energy: matrix name -> share of the squared norm that the rank cap cut off in
            this round, 0..1.
    """

    round: int
    matrices: Mapping[str, LowRank]
    dense: Mapping[str, FloatArray] = field(default_factory=dict)
    dropped_energy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run: one ledger line, and one thing for a display to show.

    Attributes:
        kind: such as `round_finished`; `docs/run-folder.md` lists them with their fields.
        fields: JSON values.
    """

    kind: str
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote: kind (`merged`, `peft`, `onnx`) -> folder or file, as text."""

    paths: Mapping[str, str]
    skipped: Mapping[str, str] = field(default_factory=dict)
