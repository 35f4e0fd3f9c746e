"""Whether a run folder's run is the one that a command asks for.

Two configurations are of one run if all that decides its result is equal. Keys that only say how
long it goes on, how patient it is, how fast this machine plays it, or what is written at its end
may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import load_run_config
from fedtune.errors import ConfigError, RunError
from fedtune.settings import RunConfig

MAY_DIFFER = (
    "run.rounds",
    "run.round_deadline_s",
    "run.minimum_devices",
    "rounds.repeats",
    "simulation.devices_per_pass",
    "deployment.sites",
    "deployment.minimum",
    "deployment.deadline_s",
    "deployment.slack",
    "data.test",
    "data.test_stride",
    "outputs.folder",
    "outputs.exports",
    "outputs.keep_checkpoints",
)
"""Keys that a run which goes on may have other values of."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that has another value in the run folder than in the command."""

    key: str
    written: object
    asked: object

    def words(self) -> str:
        """For a person: `run.seed = 1, this command has 2`."""
        return f"{self.key} = {self.written!r}, this command has {self.asked!r}"


def written_config(path: Path) -> RunConfig | None:
    """The configuration that a run was started with; None where none was written.

    Raises:
        RunError: it cannot be read, or is of another version of fedtune.
    """
    if not path.exists():
        return None
    try:
        return load_run_config(path)
    except ConfigError as error:
        raise RunError(
            f"the run in {path.parent} cannot be continued: {error}; go on with the fedtune that "
            "started it, choose another outputs.folder, or pass --overwrite to replace it"
        ) from None


def first_difference(written: RunConfig, asked: RunConfig) -> Difference | None:
    """The first key that makes another run; None if the configurations are of one run."""
    before, after = (dict(_flat(c.model_dump(mode="json"))) for c in (written, asked))
    for key in dict.fromkeys([*before, *after]):
        if key not in MAY_DIFFER and before.get(key) != after.get(key):
            return Difference(key, before.get(key), after.get(key))
    return None


def notes(written: RunConfig, asked: RunConfig) -> tuple[str, ...]:
    """What a person should know of keys that may differ, and do."""
    before, after, schedule = written.run.rounds, asked.run.rounds, asked.train.schedule
    if before == after or schedule == "constant":
        return ()
    return (
        f"run.rounds was {before} and is {after}: from here on the learning rate is that of a "
        f"{schedule} schedule of {after} rounds",
    )


def _flat(tree: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values of a tree, in its order; an empty table is a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
