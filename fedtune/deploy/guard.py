"""Ends what a supervisor started, once the supervisor is gone, however it went.

`python -I -S guard.py MARK`, with the reading end of a pipe as standard input, whose other end the
supervisor holds. Lines `+GROUP` and `-GROUP` tell of process groups; the end of the pipe says that
the supervisor has ended. Then every group is killed and, on Linux, every process whose environment
holds `FEDTUNE_SUPERVISOR=MARK`: one that left its group is found by that. It imports nothing of
fedtune, so that it stays small (one process per supervisor, about 8 MB).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

VARIABLE = "FEDTUNE_SUPERVISOR"

_ROUNDS = 5
"""A process may start another one while we look; so we look again until none is found."""


def main(mark: str) -> None:
    """Wait for the end of standard input, then kill."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for _ in range(_ROUNDS):
        found = marked(mark)
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """Processes that hold the mark, other than this one; none where there is no /proc."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1])
