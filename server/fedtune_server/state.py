"""What a run needs to go on from the end of a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtune.records import DevicePlan, GlobalAdapter


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
class RunState:
    """The state between two rounds; with the run's configuration it decides all that follows.

    Attributes:
        run: its id.
        adapter: its `round` is the last that was joined.
        server: states of the server's optimiser by name (`fedtune.aggregate.server_step`).
        plans: device -> what it does in the next round.
        turns: device -> how often it took part.
        held_out_loss_before: before the first round; None: not measured.
        planned_seconds: of all rounds so far.
    """

    run: str
    adapter: GlobalAdapter
    server: Mapping[str, GlobalAdapter] = field(default_factory=dict)
    plans: Mapping[str, DevicePlan] = field(default_factory=dict)
    turns: Mapping[str, Turns] = field(default_factory=dict)
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
