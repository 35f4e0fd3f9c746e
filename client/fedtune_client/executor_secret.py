"""What the executor shows to its node, so that other users of the machine cannot take tasks."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def executor_secret(state: Path) -> str:
    """The secret of a site's state folder; made by whoever asks first."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "executor.secret"
    made = state / f"executor.secret.{os.getpid()}"
    if not path.is_file():
        handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(made, path)  # fails if the other process was faster, and then its one counts
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_text(encoding="ascii").strip()
