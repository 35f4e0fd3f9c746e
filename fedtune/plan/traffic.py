"""Bytes and seconds of a round's two messages."""

from __future__ import annotations

from fedtune.plan.load import Load
from fedtune.records import DeviceProfile


def download_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of tensors that a device receives at the start of a round."""
    return (load.trained_elements + load.tail_elements + load.dense_parameters) * wire_itemsize


def upload_bytes(load: Load, wire_itemsize: int) -> int:
    """Bytes of tensors that a device returns at the end of a round."""
    return (load.trained_elements + load.dense_parameters) * wire_itemsize


def transfer_seconds(profile: DeviceProfile, load: Load, wire_itemsize: int) -> float:
    """Seconds of both transfers; nothing when the link's rate is unknown."""
    if profile.link_bytes_per_s <= 0:
        return 0.0
    both = download_bytes(load, wire_itemsize) + upload_bytes(load, wire_itemsize)
    return both / profile.link_bytes_per_s
