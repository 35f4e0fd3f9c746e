"""Gives memory that a process has freed back to the system, where the C library would keep it.

glibc keeps what a thread has freed for that thread, in blocks of up to 32 MB once such blocks have
been freed before. A link serves pieces of 5 MB from 40 threads, and each comes to keep some.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # malloc.h
LARGE_BYTES: Final = 512 * 1024
"""Blocks from this size on come from the system, and go back to it when they are freed; chosen."""
_ARENAS: Final = 2


def return_freed_memory() -> None:
    """Do so from now on; to be called before threads are started. Only glibc knows of it."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_ARENA_MAX, _ARENAS)
    mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
