"""Keep freed memory for the next step instead of handing it back to the operating system.

A training step frees and takes the same large buffers again and again. glibc maps each anew and
gives it back, and the kernel then zeroes every page at its first touch: a third of a small model's
step. With both thresholds out of reach freed buffers stay in the process. Its peak is the same;
between steps it does not shrink.

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


def _set_glibc() -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, _NEVER) == 1 for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
