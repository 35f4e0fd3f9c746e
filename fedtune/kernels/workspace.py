"""Buffers that a thread reuses, so that a product of every matrix needs memory for one panel only.

A fresh buffer of some megabytes costs more in page faults than the arithmetic that fills it (on
Linux 42 of 52 ms for 64 MB). What a caller finds in a buffer is what the last user left.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Purpose: TypeAlias = Literal["panel", "values", "indices", "halves"]
"""Buffers of different purposes never overlap, so one may be filled with the help of another."""

_buffers = threading.local()
_recording: list[list[Tensor]] = []
"""Where the buffers go that any thread is given while something is recorded."""


def workspace(
    numel: int, dtype: torch.dtype, device: torch.device, purpose: Purpose = "panel"
) -> Tensor:
    """The first `numel` numbers of this thread's buffer; valid until the next call like it.

    The buffer grows to the largest request and stays. On CUDA it is safe as long as the thread
    keeps to one stream.
    """
    held: dict[tuple[object, ...], Tensor] = _buffers.__dict__.setdefault("held", {})
    key = (purpose, dtype, device)
    buffer = held.get(key)
    if buffer is None or buffer.numel() < numel:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            held.pop(key, None)
            del buffer
            buffer = held[key] = torch.empty(numel, dtype=dtype, device=device)
    for taken in _recording:
        taken.append(buffer)
    return buffer[:numel]


@contextmanager
def workspaces_taken() -> Iterator[list[Tensor]]:
    """Collect the buffers that are given out meanwhile, to any thread.

    A CUDA graph keeps their addresses. Whoever keeps the list keeps the memory too, even when a
    thread has taken a larger buffer since.
    """
    taken: list[Tensor] = []
    _recording.append(taken)
    try:
        yield taken
    finally:
        _recording[:] = [other for other in _recording if other is not taken]


def release_workspaces() -> None:
    """Give this thread's buffers back."""
    _buffers.__dict__.pop("held", None)
