"""One supervisor per home: two would start two coordinators on one database."""

from __future__ import annotations

import json
from pathlib import Path

from filelock import FileLock, Timeout

from fedtune.errors import DeploymentError

STATUS_FILE = "supervisor.json"
"""What a supervisor says about itself, in the home's logs folder."""


def hold(home: Path) -> FileLock:
    """Take a home for this process; the operating system lets go when the process ends.

    Raises:
        DeploymentError: another process has it, or it cannot be locked.
    """
    lock = FileLock(home / ".supervisor.lock", timeout=0.5, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise DeploymentError(
            f"{home} is already run{_by(home)}; stop that one first, or start another home"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise DeploymentError(
            f"{home} cannot be locked ({error}); give this user the right to write there, on a "
            "local disk"
        ) from None
    return lock


def _by(home: Path) -> str:
    try:
        found = json.loads((home / "logs" / STATUS_FILE).read_text(encoding="utf-8"))
        return f" by process {int(found['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
