"""Keeps what HiGHS prints by itself off standard output, where a program may read JSON."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_STDOUT: Final = 1
_MARK: Final = b"Highs"
"""How such lines begin. HiGHS in SciPy 1.17 prints one, with all output turned off, whenever it
repairs a solution that misses a constraint by a rounding error."""


@contextmanager
def without_solver_lines() -> Iterator[None]:
    """Run the solver with standard output set aside; what is not the solver's is printed after.

    C code writes to the file descriptor, past `sys.stdout`. The descriptor is the whole process's:
    what other threads print meanwhile comes a little later.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        real = os.dup(_STDOUT)
    except OSError:  # a process without standard output
        yield
        return
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), _STDOUT)
        try:
            yield
        finally:
            _flush_c()
            os.dup2(real, _STDOUT)
            os.close(real)
            aside.seek(0)
            others = b"".join(line for line in aside if not line.startswith(_MARK))
            if others:
                os.write(_STDOUT, others)


def _flush_c() -> None:
    """Write out what C's own buffers hold; for a pipe or a file, they would keep it."""
    library = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    library.fflush(None)
