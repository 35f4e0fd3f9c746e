"""What coordinator and device tell each other, to and from protobuf bytes.

Tensors are not in here: they travel beside a message, packed by `wire.tensors`, and the message
holds their digest. Every decoder treats its bytes as hostile: the size is checked before they are
parsed, and every field before it is used, so that a record that comes out of a decoder is within
its ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from fedtune.coding import CODECS, CodecName
from fedtune.records import (
    ChannelChoice,
    DevicePlan,
    LoraScale,
    ScalingName,
    StartName,
    TaskName,
    TrainingWay,
    WayName,
)
from fedtune.v1 import fedtune_pb2 as pb
from fedtune.wire import fields
from fedtune.wire.plans import (
    decode_site_report,
    encode_site_report,
    plan_message,
    plan_record,
)

__all__ = [
    "EvaluateInstruction",
    "EvaluateReport",
    "OptimizerSpec",
    "TaskSpec",
    "TrainInstruction",
    "TrainReport",
    "decode_evaluate_instruction",
    "decode_evaluate_report",
    "decode_site_report",
    "decode_task_spec",
    "decode_train_instruction",
    "decode_train_report",
    "encode_evaluate_instruction",
    "encode_evaluate_report",
    "encode_site_report",
    "encode_task_spec",
    "encode_train_instruction",
    "encode_train_report",
]

OptimizerName = Literal["adamw", "adamw-8bit", "sgd"]
MAX_ROUND = 10**9
_PLAIN = TrainingWay()
_ONE = LoraScale()
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What the coordinator asks a site to prepare for.

    Attributes:
        matrices: names of the matrices that may be adapted.
    """

    run: str
    task: TaskName
    base_digest: str
    matrices: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """One optimiser's settings for one round.

    Attributes:
        learning_rate: at the round's first step.
        final_learning_rate: at its last; linear between.
        max_gradient_norm: 0 means no clipping.
        keep: start AdamW from what the device's earlier rounds left of it.
        way: what is trained, from where, and at which share of the learning rate.
        proximal: strength of the pull back to what the round started from; 0: none.
    """

    name: OptimizerName = "adamw"
    learning_rate: float = 5e-3
    final_learning_rate: float = 5e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_gradient_norm: float = 1.0
    keep: bool = False
    way: TrainingWay = _PLAIN
    proximal: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainInstruction:
    """One round's work for one device.

    Attributes:
        round: from 1.
        seed: of this device in this round.
        tensors_digest: hex sha256 of the packed tensors beside the message.
        evaluate: measure held-out loss before training.
        scale: of the LoRA pairs beside the message, by their rank.
        labels: class names of the whole fleet, in index order; empty unless classifying.
        codec: of the tensors to send back.
        error_feedback: make up for what the codec took from the device's earlier updates.
    """

    run: str
    round: int
    base_digest: str
    plan: DevicePlan
    optimizer: OptimizerSpec
    seed: int
    tensors_digest: str
    evaluate: bool = True
    scale: LoraScale = _ONE
    labels: tuple[str, ...] = ()
    codec: CodecName = "fp32"
    error_feedback: bool = False


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a device says of its round; its factors are beside the message.

    Attributes:
        samples: consumed by the round's steps.
        tokens: that carried loss.
        devices: whose updates are in it, where it comes from their coordinator.
        held_samples: training samples that those devices hold; 0: what the site said.
    """

    run: str
    round: int
    device: str
    base_digest: str
    samples: int
    tokens: int
    tensors_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    devices: int = 1
    held_samples: int = 0


@dataclass(frozen=True, slots=True)
class EvaluateInstruction:
    """Measure held-out loss with the adapter beside the message; train nothing.

    Attributes:
        round: rounds that the adapter has seen; 0 for the untrained one.
        labels: class names of the whole fleet, in index order; empty unless classifying.
    """

    run: str
    round: int
    base_digest: str
    plan: DevicePlan
    tensors_digest: str
    scale: LoraScale = _ONE
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluateReport:
    """Loss per token or sample, and over how many, by name."""

    run: str
    round: int
    device: str
    metrics: Mapping[str, float] = field(default_factory=dict)


# ---------------------------------------------------------------- the profile query


def encode_task_spec(spec: TaskSpec) -> bytes:
    """The protobuf bytes of a task."""
    message = pb.TaskSpec(
        run=spec.run,
        task=spec.task,
        base_digest=spec.base_digest,
        matrices=spec.matrices,
        seed=spec.seed,
    )
    return message.SerializeToString(deterministic=True)


def decode_task_spec(data: bytes) -> TaskSpec:
    """Read a task.

    Raises:
        ProtocolError: the bytes are no task, or a field is out of its range.
    """
    message = fields.parse(pb.TaskSpec(), data, "TaskSpec")
    return TaskSpec(
        run=fields.text(message.run, "run"),
        task=cast(TaskName, fields.one_of(message.task, "task", get_args(TaskName))),
        base_digest=fields.text(message.base_digest, "base_digest"),
        matrices=fields.texts(message.matrices, "matrices"),
        seed=fields.whole(message.seed, "seed", 0, _MAX_SEED),
    )


# ---------------------------------------------------------------- training


def encode_train_instruction(instruction: TrainInstruction) -> bytes:
    """The protobuf bytes of one round's work."""
    optimizer = instruction.optimizer
    message = pb.TrainInstruction(
        run=instruction.run,
        round=instruction.round,
        base_digest=instruction.base_digest,
        plan=plan_message(instruction.plan),
        optimizer=pb.OptimizerSpec(
            name=optimizer.name,
            learning_rate=optimizer.learning_rate,
            final_learning_rate=optimizer.final_learning_rate,
            weight_decay=optimizer.weight_decay,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            max_gradient_norm=optimizer.max_gradient_norm,
            keep=optimizer.keep,
            way=_way_message(optimizer.way),
            proximal=optimizer.proximal,
        ),
        seed=instruction.seed,
        tensors_digest=instruction.tensors_digest,
        evaluate=instruction.evaluate,
        scale=instruction.scale.value,
        labels=instruction.labels,
        codec=instruction.codec,
        error_feedback=instruction.error_feedback,
        scaling=instruction.scale.scaling,
    )
    return message.SerializeToString(deterministic=True)


def decode_train_instruction(data: bytes) -> TrainInstruction:
    """Read one round's work.

    Raises:
        ProtocolError: the bytes are no instruction, or a field is out of its range.
    """
    message = fields.parse(pb.TrainInstruction(), data, "TrainInstruction")
    return TrainInstruction(
        run=fields.text(message.run, "run"),
        round=fields.whole(message.round, "round", 1, MAX_ROUND),
        base_digest=fields.text(message.base_digest, "base_digest"),
        plan=plan_record(message.plan),
        optimizer=_optimizer_record(message.optimizer),
        seed=fields.whole(message.seed, "seed", 0, _MAX_SEED),
        tensors_digest=fields.text(message.tensors_digest, "tensors_digest"),
        evaluate=message.evaluate,
        scale=_scale(message.scale, message.scaling),
        labels=fields.texts(message.labels, "labels"),
        codec=cast(CodecName, fields.one_of(message.codec, "codec", CODECS)),
        error_feedback=message.error_feedback,
    )


def _optimizer_record(message: pb.OptimizerSpec) -> OptimizerSpec:
    name = fields.one_of(message.name, "optimizer.name", get_args(OptimizerName))
    below_one = 1.0 - 1e-12
    return OptimizerSpec(
        name=cast(OptimizerName, name),
        learning_rate=fields.real(message.learning_rate, "optimizer.learning_rate", 0.0, 1e3),
        final_learning_rate=fields.real(
            message.final_learning_rate, "optimizer.final_learning_rate", 0.0, 1e3
        ),
        weight_decay=fields.real(message.weight_decay, "optimizer.weight_decay", 0.0, 1e3),
        beta1=fields.real(message.beta1, "optimizer.beta1", 0.0, below_one),
        beta2=fields.real(message.beta2, "optimizer.beta2", 0.0, below_one),
        max_gradient_norm=fields.real(
            message.max_gradient_norm, "optimizer.max_gradient_norm", 0.0
        ),
        keep=message.keep,
        way=_way_record(message.way) if message.HasField("way") else TrainingWay(),
        proximal=fields.real(message.proximal, "optimizer.proximal", 0.0, 1e6),
    )


def _scale(value: float, scaling: str) -> LoraScale:
    names = get_args(ScalingName)
    return LoraScale(
        fields.real(value, "scale", 1e-9, 1e6),
        cast(ScalingName, fields.one_of(scaling or "constant", "scaling", names)),
    )


def _way_message(way: TrainingWay) -> pb.TrainingWay:
    return pb.TrainingWay(
        name=way.name,
        start=way.start,
        layer_rate_decay=way.layer_rate_decay,
        flops_share=way.flops_share,
        allora_eta=way.allora_eta,
        channels=way.channels,
        seed=way.seed,
    )


def _way_record(message: pb.TrainingWay) -> TrainingWay:
    name = fields.one_of(message.name, "way.name", get_args(WayName))
    start = fields.one_of(message.start, "way.start", get_args(StartName))
    channels = fields.one_of(message.channels, "way.channels", get_args(ChannelChoice))
    return TrainingWay(
        name=cast(WayName, name),
        start=cast(StartName, start),
        layer_rate_decay=fields.real(message.layer_rate_decay, "way.layer_rate_decay", 1e-3, 1.0),
        flops_share=fields.real(message.flops_share, "way.flops_share", 1e-6, 1.0),
        allora_eta=fields.real(message.allora_eta, "way.allora_eta", 1e-3, 1e3),
        channels=cast(ChannelChoice, channels),
        seed=fields.whole(message.seed, "way.seed", 0, _MAX_SEED),
    )


def encode_train_report(report: TrainReport) -> bytes:
    """The protobuf bytes of a device's report."""
    message = pb.TrainReport(
        run=report.run,
        round=report.round,
        device=report.device,
        base_digest=report.base_digest,
        samples=report.samples,
        tokens=report.tokens,
        metrics=report.metrics,
        tensors_digest=report.tensors_digest,
        devices=report.devices if report.devices != 1 else 0,
        held_samples=report.held_samples,
    )
    return message.SerializeToString(deterministic=True)


def decode_train_report(data: bytes) -> TrainReport:
    """Read a device's report.

    Raises:
        ProtocolError: the bytes are no report, or a field is out of its range; a loss that is
            not finite is refused here, by its name.
    """
    message = fields.parse(pb.TrainReport(), data, "TrainReport")
    return TrainReport(
        run=fields.text(message.run, "run"),
        round=fields.whole(message.round, "round", 1, MAX_ROUND),
        device=fields.text(message.device, "device", longest=128),
        base_digest=fields.text(message.base_digest, "base_digest"),
        samples=fields.whole(message.samples, "samples", 0, fields.MAX_COUNT),
        tokens=fields.whole(message.tokens, "tokens", 0, fields.MAX_COUNT),
        tensors_digest=fields.text(message.tensors_digest, "tensors_digest"),
        metrics=fields.reals(message.metrics, "metrics"),
        devices=fields.whole(message.devices or 1, "devices", 1, fields.MAX_DEVICES),
        held_samples=fields.whole(message.held_samples, "held_samples", 0, fields.MAX_COUNT),
    )


# ---------------------------------------------------------------- evaluation


def encode_evaluate_instruction(instruction: EvaluateInstruction) -> bytes:
    """The protobuf bytes of an evaluation to do."""
    message = pb.EvaluateInstruction(
        run=instruction.run,
        round=instruction.round,
        base_digest=instruction.base_digest,
        plan=plan_message(instruction.plan),
        tensors_digest=instruction.tensors_digest,
        scale=instruction.scale.value,
        labels=instruction.labels,
        scaling=instruction.scale.scaling,
    )
    return message.SerializeToString(deterministic=True)


def decode_evaluate_instruction(data: bytes) -> EvaluateInstruction:
    """Read an evaluation to do.

    Raises:
        ProtocolError: the bytes are no instruction, or a field is out of its range.
    """
    message = fields.parse(pb.EvaluateInstruction(), data, "EvaluateInstruction")
    return EvaluateInstruction(
        run=fields.text(message.run, "run"),
        round=fields.whole(message.round, "round", 0, MAX_ROUND),
        base_digest=fields.text(message.base_digest, "base_digest"),
        plan=plan_record(message.plan),
        tensors_digest=fields.text(message.tensors_digest, "tensors_digest"),
        scale=_scale(message.scale, message.scaling),
        labels=fields.texts(message.labels, "labels"),
    )


def encode_evaluate_report(report: EvaluateReport) -> bytes:
    """The protobuf bytes of what an evaluation found."""
    message = pb.EvaluateReport(
        run=report.run, round=report.round, device=report.device, metrics=report.metrics
    )
    return message.SerializeToString(deterministic=True)


def decode_evaluate_report(data: bytes) -> EvaluateReport:
    """Read what an evaluation found.

    Raises:
        ProtocolError: the bytes are no report, or a field is out of its range.
    """
    message = fields.parse(pb.EvaluateReport(), data, "EvaluateReport")
    return EvaluateReport(
        run=fields.text(message.run, "run"),
        round=fields.whole(message.round, "round", 0, MAX_ROUND),
        device=fields.text(message.device, "device", longest=128),
        metrics=fields.reals(message.metrics, "metrics"),
    )
