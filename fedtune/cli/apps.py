"""Server and client code by name: the command line imports neither."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from fedtune.errors import DeploymentError


def load_app(name: str) -> Any:  # entry points are untyped
    """What the installed distribution offers under a name of the group `fedtune.apps`.

    Raises:
        DeploymentError: the installation is older than this code, or not whole.
    """
    found = entry_points(group="fedtune.apps", name=name)
    if not found:
        raise DeploymentError(
            f"fedtune is not installed whole: no entry point {name!r}; install it again"
        )
    return next(iter(found)).load()
