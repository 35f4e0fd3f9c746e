"""Becomes the command it is given, after asking Linux to end it with its parent.

`python -I -S launcher.py PARENT COMMAND ...`: a program of its own because code between fork and
exec of a process with threads may deadlock. It imports nothing of fedtune. What it asks for
(PR_SET_PDEATHSIG, see prctl(2)) stays over the exec, but is not inherited by the command's own
children: for those there is `guard.py`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Never returns.

    Args:
        parent: the process that must be our parent; it may have died before we asked.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]} cannot be started ({error.strerror})", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
