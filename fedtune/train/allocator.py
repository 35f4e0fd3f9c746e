"""Keep freed memory for the next step instead of handing it back to the operating system.

A training step frees and takes the same large buffers again and again. glibc maps each anew and
gives it back, and the kernel then zeroes every page at its first touch: a third of a small model's
step. With both thresholds out of reach freed buffers stay in the process. That has a price: what
a step frees does not fit what the next one takes, and gaps remain, up to two fifths of the tensors.
A device that has no room for them keeps small buffers only.

For the edge of a device process, before it trains. Never on import: whoever merely uses the
library keeps the allocator that they have.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from functools import lru_cache
from typing import Final

import torch

_log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
"""Parameters of `mallopt(3)`."""
_NEVER: Final = 2**31 - 1
_LARGE: Final = 256 << 10
"""Bytes from which on a buffer is given back where memory is short. Measured on a Llama of 60
million parameters, 512 tokens at a time: 4 % over the tensors, where 1 MiB leaves 12 % and no
limit 36 %; a step then takes 5 to 25 % longer."""
KEPT_SHARE: Final = 1.5
"""Of a plan's peak, what a device needs to keep all that it frees; measured up to 1.41."""
_CUDA_SETTING: Final = "PYTORCH_CUDA_ALLOC_CONF"


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Set the allocators of this process, once; True if the host's could be set.

    On CUDA, unless the user chose otherwise, torch is told to grow its segments: lengths that
    change from step to step would otherwise leave gaps that nothing fits.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ.setdefault(_CUDA_SETTING, "expandable_segments:True")
    done = _set_glibc()
    _log.info("allocator: %s", "freed memory is kept" if done else "left as it is")
    return done


def keep_what_fits(peak_bytes: int, budget_bytes: int) -> bool:
    """Keep all freed memory if that stays within a device's budget, else only small buffers.

    Args:
        peak_bytes: of the plan that it is about to follow.

    Returns:
        Whether all of it is kept.
    """
    everything = budget_bytes >= KEPT_SHARE * peak_bytes
    if keep_freed_memory():
        _mallopt(_M_MMAP_THRESHOLD, _NEVER if everything else _LARGE)
        _log.info("allocator: %s freed memory is kept", "all" if everything else "little")
    return everything


def _set_glibc() -> bool:
    return _mallopt(_M_MMAP_THRESHOLD, _NEVER) and _mallopt(_M_TRIM_THRESHOLD, _NEVER)


def _mallopt(name: int, value: int) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(name, value) == 1)
