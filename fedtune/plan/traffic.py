"""Bytes and seconds of a round's two messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.coding import CodecName, coded_bytes
from fedtune.plan.load import Load
from fedtune.plan.weights import FLOAT_BYTES
from fedtune.records import DeviceProfile, MatrixShape

TENSOR_BYTES = 4
"""Of a tensor's name and shape in a deflated header; measured on 35 and on 224 matrices."""
_LENGTH_BYTES = 8
_ANY_LENGTH = 4096
"""Of a direction, where no model is at hand."""


@dataclass(frozen=True, slots=True)
class WireCosts:
    """What a number costs in a message.

    Attributes:
        down: bytes of a number that a device is sent, with its part of the scales.
        up: bytes of a number that it sends back.
        header_bytes: of each message beside its numbers.
        feedback: the device keeps what its updates leave out.
    """

    down: float = FLOAT_BYTES
    up: float = FLOAT_BYTES
    header_bytes: int = 0
    feedback: bool = False


def wire_costs(
    down: CodecName,
    up: CodecName,
    matrices: Sequence[MatrixShape],
    dense_tensors: int = 0,
    *,
    error_feedback: bool = False,
) -> WireCosts:
    """The costs of two codecs, as a mean over a model's matrices with a direction of each."""
    sides = [side for matrix in matrices for side in (matrix.out_features, matrix.in_features)]
    lengths = sides or [_ANY_LENGTH]

    def bytes_of(codec: CodecName) -> float:
        # Eight directions: codes of an odd number of bits fill whole bytes in a tensor.
        coded = sum(coded_bytes(codec, (8, length)) for length in lengths)
        return coded / (8 * sum(lengths))

    tensors = 2 * len(matrices) + dense_tensors
    return WireCosts(
        down=bytes_of(down),
        up=bytes_of(up),
        header_bytes=_LENGTH_BYTES + TENSOR_BYTES * tensors,
        feedback=error_feedback and up != "fp32",
    )


def download_bytes(load: Load, wire: WireCosts) -> int:
    """Bytes of tensors that a device receives at the start of a round."""
    return wire.header_bytes + math.ceil(_received(load) * wire.down)


def upload_bytes(load: Load, wire: WireCosts) -> int:
    """Bytes of tensors that a device returns at the end of a round."""
    return wire.header_bytes + math.ceil(_returned(load) * wire.up)


def message_bytes(load: Load, wire: WireCosts) -> int:
    """Bytes of host memory that a round's messages take while it goes on.

    The received one as it came and, unless it came in float32, once more as float32 arrays; and
    what the last two updates left out, where the device makes up for it.
    """
    received = download_bytes(load, wire)
    if wire.down < FLOAT_BYTES:
        received += _received(load) * FLOAT_BYTES
    return received + (2 * _returned(load) * FLOAT_BYTES if wire.feedback else 0)


def transfer_seconds(profile: DeviceProfile, load: Load, wire: WireCosts) -> float:
    """Seconds of both transfers; nothing when the link's rate is unknown."""
    if profile.link_bytes_per_s <= 0:
        return 0.0
    both = download_bytes(load, wire) + upload_bytes(load, wire)
    return both / profile.link_bytes_per_s


def _received(load: Load) -> int:
    return load.trained_elements + load.tail_elements + load.dense_parameters


def _returned(load: Load) -> int:
    return load.trained_elements + load.dense_parameters
