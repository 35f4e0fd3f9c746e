"""Bytes and seconds of a round's two messages."""

from __future__ import annotations

from fedtune.plan.load import Load
from fedtune.plan.weights import FLOAT_BYTES
from fedtune.records import DeviceProfile


def download_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of tensors that a device receives at the start of a round."""
    return (load.trained_elements + load.tail_elements + load.dense_parameters) * wire_itemsize


def upload_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of tensors that a device returns at the end of a round."""
    return (load.trained_elements + load.dense_parameters) * wire_itemsize


def message_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of host memory in which a received message lies while the round goes on.

    As it came and, unless it came in float32, once more as float32 arrays.
    """
    received = download_bytes(load, wire_itemsize)
    if wire_itemsize == FLOAT_BYTES:
        return received
    return received + received // wire_itemsize * FLOAT_BYTES


def transfer_seconds(profile: DeviceProfile, load: Load, wire_itemsize: int) -> float:
    """Seconds of both transfers; nothing when the link's rate is unknown."""
    if profile.link_bytes_per_s <= 0:
        return 0.0
    both = download_bytes(load, wire_itemsize) + upload_bytes(load, wire_itemsize)
    return both / profile.link_bytes_per_s
