"""In which dtype a device computes: asked for, or measured once per process.

Factors, their gradients and the optimiser's state are float32 in any case; so are losses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from fedtune.records import ComputeName

_log = logging.getLogger(__name__)

_SIDE: Final = 512
"""Side of the square matrices that are multiplied to compare dtypes: 0.27 GFLOP, some 3 ms."""
_WORTH_IT: Final = 1.5
"""How much faster bfloat16 must be. With the instructions for it a CPU is 2 to 16 times as fast and
without them 17 to 60 times as slow: anything near 1 is noise, and leaves float32 its exactness."""

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(asked: ComputeName, device: torch.device) -> torch.dtype:
    """The dtype of activations and products.

    `auto` is bfloat16 on CUDA devices that have it (compute capability 8.0), float16 on older
    ones, and on a CPU bfloat16 only where a measured product is clearly faster.
    """
    if asked != "auto":
        return _DTYPES[asked]
    return _measured(device.type, device.index)


@lru_cache(maxsize=8)
def _measured(kind: str, index: int | None) -> torch.dtype:
    if kind == "cuda":
        capable = torch.cuda.get_device_capability(index) >= (8, 0)
        chosen = torch.bfloat16 if capable else torch.float16
        _log.info("compute dtype: %s, by the capability of the device", chosen)
        return chosen
    return faster_dtype(_product_seconds)


def faster_dtype(seconds: Callable[[torch.dtype], float]) -> torch.dtype:
    """bfloat16 if it is clearly faster than float32, else float32.

    Args:
        seconds: time of the same product in a dtype.
    """
    gain = seconds(torch.float32) / seconds(torch.bfloat16)
    chosen = torch.bfloat16 if gain >= _WORTH_IT else torch.float32
    _log.info("compute dtype: %s; bfloat16 is %.2f times as fast as float32", chosen, gain)
    return chosen


def _product_seconds(dtype: torch.dtype) -> float:
    """Best of five; the first call is a warm-up, and never counts."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIDE, _SIDE, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for run in range(6):
        started = time.perf_counter()
        left @ right
        if run:
            best = min(best, time.perf_counter() - started)
    return best


class LossScale:
    """Keeps float16 gradients off zero and off infinity (arXiv 1710.03740, section 3.2).

    The loss is multiplied before the backward pass and the gradients are divided after it. When
    one is not finite the step is skipped and the scale halved; after `patience` good steps in a
    row it is doubled.

    Args:
        value: first scale; that of torch.amp.
        patience: chosen below torch.amp's 2000, because a round has few steps.
    """

    def __init__(self, value: float = 2.0**16, patience: int = 200) -> None:
        self.value, self._patience, self._good = value, patience, 0
        self.skipped = 0

    def tensors(self) -> dict[str, Tensor]:
        """Where it stands, for a file."""
        return {"value": torch.tensor(self.value), "good": torch.tensor(self._good)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LossScale:
        """The way back from `tensors`; a first scale where there are none."""
        scale = cls()
        if tensors:
            scale.value, scale._good = float(tensors["value"]), int(tensors["good"])
        return scale

    def unscale(self, parameters: Sequence[Tensor]) -> bool:
        """Divide the gradients; True if all are finite and the step may be taken."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return True
        device = gradients[0].device
        found = torch.zeros((), device=device)
        # One pass and one number that leaves the device; what torch.amp's scaler calls as well.
        torch._amp_foreach_non_finite_check_and_unscale_(
            gradients, found, torch.tensor(1.0 / self.value, device=device)
        )
        finite = not bool(found)
        self._update(finite)
        return finite

    def _update(self, finite: bool) -> None:
        if not finite:
            self.skipped += 1
            self.value, self._good = max(1.0, self.value / 2), 0
            return
        self._good += 1
        if self._good == self._patience:
            self.value, self._good = self.value * 2, 0
