"""Whether a run file can be tried on this machine, or is for real sites alone."""

from __future__ import annotations

from fedtune.errors import ConfigError
from fedtune.settings import RunConfig


def need_simulated_fleet(config: RunConfig, *, data: bool = True) -> None:
    """Refuse a run file without devices, or without data, to simulate.

    Args:
        data: whether data is needed, too.

    Raises:
        ConfigError: the run file is for real sites; what is missing.
    """
    missing = []
    if not config.fleet:
        missing.append("[fleet.NAME] with count and memory")
    if data and not config.data.train and not config.data.sites:
        missing.append("data.train or data.sites")
    if missing:
        raise ConfigError(
            f"run {config.run.name} is for real sites (deployment.sites): fedtune run plays it; to "
            f"try it on this machine, add {' and '.join(missing)}"
        )
