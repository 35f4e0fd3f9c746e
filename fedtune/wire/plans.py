"""A site's report and a device's plan, to and from protobuf."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

from fedtune.errors import ProtocolError
from fedtune.records import (
    BACKBONE_FORMATS,
    ComputeName,
    DevicePlan,
    DeviceProfile,
    FormatName,
    MatrixPlan,
    SiteReport,
)
from fedtune.v1 import fedtune_pb2 as pb
from fedtune.wire import fields

MAX_DENSE_ELEMENTS = 2**31
_MAX_BYTES = 2**50
_COMPUTE_NAMES = ("", "fp32", "bf16", "fp16")


def encode_site_report(report: SiteReport) -> bytes:
    """The protobuf bytes of a site's answer to the profile query."""
    message = pb.SiteReport(
        profile=_profile_message(report.profile),
        base_digest=report.base_digest,
        train_samples=report.train_samples,
        held_out_samples=report.held_out_samples,
        train_tokens=report.train_tokens,
        dense=[
            pb.DenseShape(name=name, shape=shape) for name, shape in sorted(report.dense.items())
        ],
        labels=report.labels,
        warnings=report.warnings,
        devices=report.devices if report.devices != 1 else 0,
    )
    return message.SerializeToString(deterministic=True)


def decode_site_report(data: bytes) -> SiteReport:
    """Read a site's answer.

    Raises:
        ProtocolError: the bytes are no report, or a field is out of its range.
    """
    message = fields.parse(pb.SiteReport(), data, "SiteReport")
    fields.count(message.warnings, "warnings", 100)
    return SiteReport(
        profile=_profile_record(message.profile),
        base_digest=fields.text(message.base_digest, "base_digest"),
        train_samples=fields.whole(message.train_samples, "train_samples", 0, fields.MAX_COUNT),
        held_out_samples=fields.whole(
            message.held_out_samples, "held_out_samples", 0, fields.MAX_COUNT
        ),
        train_tokens=fields.whole(message.train_tokens, "train_tokens", 0, fields.MAX_COUNT),
        dense=_dense_shapes(message.dense),
        labels=fields.texts(message.labels, "labels"),
        warnings=tuple(fields.text(line, "warnings", longest=2000) for line in message.warnings),
        devices=fields.whole(message.devices or 1, "devices", 1, fields.MAX_DEVICES),
    )


def _dense_shapes(entries: Iterable[pb.DenseShape]) -> dict[str, tuple[int, ...]]:
    entries = tuple(entries)
    fields.count(entries, "dense", 1000)
    fields.unique((entry.name for entry in entries), "dense")
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        name = fields.text(entry.name, "dense.name")
        shape = tuple(entry.shape)
        # 0 stands for the number of labels, which no site knows alone.
        elements = math.prod(axis or 1 for axis in shape)
        if not 1 <= len(shape) <= 4 or elements > MAX_DENSE_ELEMENTS:
            raise ProtocolError(
                f"dense {fields.shown(name)}: expected 1 to 4 dimensions and up to "
                f"{MAX_DENSE_ELEMENTS} elements, got shape {shape[:8]}"
            )
        shapes[name] = shape
    return shapes


def _profile_message(profile: DeviceProfile) -> pb.DeviceProfile:
    return pb.DeviceProfile(
        name=profile.name,
        device_class=profile.device_class,
        cpu_threads=profile.cpu_threads,
        memory_bytes=profile.memory_bytes,
        accelerator=profile.accelerator,
        accelerator_memory_bytes=profile.accelerator_memory_bytes,
        matmul_flops_per_s=profile.matmul_flops_per_s,
        memory_bandwidth_bytes_per_s=profile.memory_bandwidth_bytes_per_s,
        link_bytes_per_s=profile.link_bytes_per_s,
        formats=profile.formats,
        versions=profile.versions,
        compute="" if profile.compute == "auto" else profile.compute,
    )


def _profile_record(message: pb.DeviceProfile) -> DeviceProfile:
    fields.count(message.formats, "profile.formats", 16)
    fields.unique(message.formats, "profile.formats")
    fields.count(message.versions, "profile.versions", 256)
    if not message.formats:
        raise ProtocolError("profile.formats: expected at least one backbone format, got none")
    return DeviceProfile(
        name=fields.text(message.name, "profile.name", longest=128),
        device_class=fields.text(message.device_class, "profile.device_class", longest=128),
        cpu_threads=fields.whole(message.cpu_threads, "profile.cpu_threads", 0, 2**16),
        memory_bytes=fields.whole(message.memory_bytes, "profile.memory_bytes", 1, _MAX_BYTES),
        accelerator=fields.one_of(message.accelerator, "profile.accelerator", ("cpu", "cuda")),
        accelerator_memory_bytes=fields.whole(
            message.accelerator_memory_bytes, "profile.accelerator_memory_bytes", 0, _MAX_BYTES
        ),
        matmul_flops_per_s=fields.reals(
            message.matmul_flops_per_s, "profile.matmul_flops_per_s", low=0.0, most=16
        ),
        memory_bandwidth_bytes_per_s=fields.real(
            message.memory_bandwidth_bytes_per_s, "profile.memory_bandwidth_bytes_per_s", 0.0
        ),
        link_bytes_per_s=fields.real(message.link_bytes_per_s, "profile.link_bytes_per_s", 0.0),
        formats=tuple(_format(name, "profile.formats") for name in message.formats),
        versions={
            fields.text(name, "profile.versions name"): fields.text(
                message.versions[name], "profile.versions", empty=True
            )
            for name in sorted(message.versions)
        },
        compute=_compute(message.compute),
    )


def _compute(value: str) -> ComputeName:
    """The field is empty where a device does not say, as those do that do not know the field."""
    return cast(ComputeName, fields.one_of(value, "profile.compute", _COMPUTE_NAMES) or "auto")


def _format(value: str, field: str) -> FormatName:
    return cast(FormatName, fields.one_of(value, field, BACKBONE_FORMATS))


# ---------------------------------------------------------------- the plan


def plan_message(plan: DevicePlan) -> pb.DevicePlan:
    """The protobuf message of one device's plan."""
    return pb.DevicePlan(
        device=plan.device,
        matrices=[
            pb.MatrixPlan(
                name=matrix.name,
                rank=matrix.rank,
                tail_rank=matrix.tail_rank,
                format=matrix.format,
                block_size=matrix.block_size,
                correction_rank=matrix.correction_rank,
            )
            for matrix in plan.matrices
        ],
        micro_batch=plan.micro_batch,
        batch_size=plan.batch_size,
        sequence_length=plan.sequence_length,
        local_steps=plan.local_steps,
        checkpointing=plan.checkpointing,
        first_trained_layer=plan.first_trained_layer,
        peak_bytes=plan.peak_bytes,
        seconds=plan.seconds,
        download_bytes=plan.download_bytes,
        upload_bytes=plan.upload_bytes,
        binding=plan.binding,
    )


def plan_record(message: pb.DevicePlan) -> DevicePlan:
    """The plan that a message holds.

    Raises:
        ProtocolError: a field is out of its range.
    """
    fields.count(message.matrices, "plan.matrices")
    fields.unique((matrix.name for matrix in message.matrices), "plan.matrices")
    micro_batch = fields.whole(message.micro_batch, "plan.micro_batch", 1, 2**16)
    batch_size = fields.whole(message.batch_size, "plan.batch_size", 1, 2**24)
    if batch_size % micro_batch:
        raise ProtocolError(
            f"plan.batch_size: expected a multiple of micro_batch {micro_batch}, got {batch_size}"
        )
    return DevicePlan(
        device=fields.text(message.device, "plan.device", longest=128),
        matrices=tuple(_matrix_record(matrix) for matrix in message.matrices),
        micro_batch=micro_batch,
        batch_size=batch_size,
        sequence_length=fields.whole(message.sequence_length, "plan.sequence_length", 1, 2**24),
        local_steps=fields.whole(message.local_steps, "plan.local_steps", 1, 10**9),
        checkpointing=message.checkpointing,
        first_trained_layer=fields.whole(
            message.first_trained_layer, "plan.first_trained_layer", 0, 10**5
        ),
        peak_bytes=fields.whole(message.peak_bytes, "plan.peak_bytes", 0, _MAX_BYTES),
        seconds=fields.real(message.seconds, "plan.seconds", 0.0),
        download_bytes=fields.whole(message.download_bytes, "plan.download_bytes", 0, _MAX_BYTES),
        upload_bytes=fields.whole(message.upload_bytes, "plan.upload_bytes", 0, _MAX_BYTES),
        binding=fields.text(message.binding, "plan.binding", empty=True),
    )


def _matrix_record(message: pb.MatrixPlan) -> MatrixPlan:
    name = fields.text(message.name, "plan.matrices.name")
    return MatrixPlan(
        name=name,
        rank=fields.whole(message.rank, f"plan rank of {name}", 0, fields.MAX_RANK),
        tail_rank=fields.whole(message.tail_rank, f"plan tail rank of {name}", 0, fields.MAX_RANK),
        format=_format(message.format, f"plan format of {name}"),
        block_size=fields.whole(message.block_size, f"plan block size of {name}", 0, 2**24),
        correction_rank=fields.whole(
            message.correction_rank, f"plan correction rank of {name}", 0, fields.MAX_RANK
        ),
    )
