"""What a run needs to go on from the end of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    GlobalAdapter,
    SiteReport,
)
from fedtune_server.drift import Standing


@dataclass(frozen=True, slots=True)
class Turns:
    """How often a device took part so far.

    Attributes:
        taken: rounds.
        last: the latest of them; 0 before the first.
    """

    taken: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """What is held true of one device, which may be other than it said before the first round.

    Attributes:
        profile: as it last reported it.
        standing: what its rounds have shown since.
        hopeless_bytes: memory for which no plan was found; 0: never looked for in vain.
    """

    profile: DeviceProfile
    standing: Standing
    hopeless_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Known:
    """What the first plan was made with, beside the files of the run folder.

    Attributes:
        reports: device -> what it said before the first round, in the order of their names.
        calibration: device class -> what measured steps say of its costs.
        digests: file of the run folder that the plan was made with -> its sha256.
    """

    reports: Mapping[str, SiteReport] = field(default_factory=dict)
    calibration: Mapping[str, CostCalibration] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunState:
    """The state between two rounds; with the run's configuration it decides all that follows.

    There is no state of a random generator in it: each draw comes from a generator that is seeded
    with the run's seed and the round's number.

    Attributes:
        run: its id.
        adapter: its `round` is the last that was joined.
        server: states of the server's optimiser by name (`fedtune.aggregate.server_step`).
        plans: device -> what it does in the next round.
        turns: device -> how often it took part.
        held: device -> what is held true of it.
        known: what the first plan was made with.
        held_out_loss_before: before the first round; None: not measured.
        planned_seconds: of all rounds so far.
    """

    run: str
    adapter: GlobalAdapter
    server: Mapping[str, GlobalAdapter] = field(default_factory=dict)
    plans: Mapping[str, DevicePlan] = field(default_factory=dict)
    turns: Mapping[str, Turns] = field(default_factory=dict)
    held: Mapping[str, Held] = field(default_factory=dict)
    known: Known = Known()
    held_out_loss_before: float | None = None
    planned_seconds: float = 0.0

    @property
    def round(self) -> int:
        """The last round that was joined; 0 before the first."""
        return self.adapter.round


def with_turns(
    turns: Mapping[str, Turns], devices: tuple[str, ...], round: int
) -> dict[str, Turns]:
    """The turns after a round in which some devices took part."""
    after = dict(turns)
    for device in devices:
        after[device] = Turns(after.get(device, Turns()).taken + 1, round)
    return after
