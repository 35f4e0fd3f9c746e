"""What real sites make of a run file: what it says of simulations does not hold."""

from __future__ import annotations

from pathlib import Path

from fedtune.errors import ConfigError
from fedtune.settings import OutputsSection, RunConfig, SimulationSection


def deployed_config(config: RunConfig, folder: Path) -> RunConfig:
    """The run as real sites play it, in its folder.

    Raises:
        ConfigError: it names no sites.
    """
    if not config.deployment.sites:
        raise ConfigError(
            "deployment.sites is empty; name the sites that take part, or '*' for all"
        )
    outputs = config.outputs.model_dump() | {"folder": str(folder)}
    return config.model_copy(
        update={
            # Steps take the time that they take: what devices measure counts.
            "simulation": SimulationSection(clock="measured"),
            "outputs": OutputsSection.model_validate(outputs),
        }
    )
