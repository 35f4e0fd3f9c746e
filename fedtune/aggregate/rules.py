"""The rules for joining unequal adapters, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedtune.aggregate.delta import Delta
from fedtune.aggregate.directions import TailUse
from fedtune.aggregate.flexlora import FlexLora
from fedtune.aggregate.flora import Flora
from fedtune.aggregate.zero_pad import ZeroPad
from fedtune.errors import ConfigError
from fedtune.records import (
    Contribution,
    DevicePlan,
    Dispatch,
    FloatArray,
    GlobalAdapter,
    MatrixShape,
    Scale,
)


@runtime_checkable
class Rule(Protocol):
    """How a fleet's unequal adapters become one. A rule keeps no state between calls."""

    @property
    def name(self) -> str:
        """The name in a run file."""

    @property
    def tail(self) -> TailUse:
        """What of the global adapter a device gets frozen, for the planner to leave room for:
        `planned` (as much as its plan says), `none`, or `whole` (all of it, whatever the cap).
        """

    def start(
        self, matrices: Sequence[MatrixShape], dense: Mapping[str, FloatArray]
    ) -> GlobalAdapter:
        """The state before the first round.

        Args:
            matrices: those that may be adapted.
            dense: initial values of the parameters that are trained whole.
        """

    def dispatch(
        self, adapter: GlobalAdapter, plan: DevicePlan, *, scale: Scale, rng: np.random.Generator
    ) -> Dispatch:
        """What one device starts a round from, in float32.

        Args:
            adapter: the state after the last round.
            plan: gives trained rank and tail rank of each matrix.
            scale: of every LoRA pair, by its trained rank; positive.
            rng: seed it alike for all devices of a round; then fresh directions are shared, and
                a device of lower rank holds the leading ones of a device of higher rank.

        Raises:
            PlanError: the plan names a matrix that the adapter does not hold, or a rank that
                the rule cannot give.
        """

    def join(self, adapter: GlobalAdapter, contributions: Sequence[Contribution]) -> GlobalAdapter:
        """The state after a round. The inputs stay as they are; their order does not matter.

        Raises:
            RoundError: there is no contribution, or a device's difference is to be multiplied
                by a factor and the rule joins no differences.
            RefusedUpdateError: an update does not return exactly what was sent.
        """


RULES: Mapping[str, type[Delta] | type[FlexLora] | type[Flora] | type[ZeroPad]] = {
    "delta": Delta,
    "zero-pad": ZeroPad,
    "flexlora": FlexLora,
    "flora": Flora,
}


def make_rule(
    name: str, rank_cap: int, *, seed: int = 0, fresh_rank: int = 0, workers: int | None = None
) -> Rule:
    """Build a rule; an option that the rule does not know is left out.

    Args:
        name: a key of `RULES`.
        rank_cap: directions that the state keeps per matrix; `flora` has no cap.
        seed: of what every device starts from under `zero-pad`.
        fresh_rank: directions that start at zero in every round, for `delta` and `flexlora`.
        workers: matrices that are joined at the same time, which changes no bit of the result;
            None: the usable cores.

    Raises:
        ConfigError: there is no rule of this name, or a number is out of range.
    """
    if name not in RULES:
        raise ConfigError(f"aggregate.rule must be one of {', '.join(RULES)}, got {name!r}")
    if rank_cap < 1:
        raise ConfigError(f"lora.rank_cap must be at least 1, got {rank_cap}")
    if fresh_rank < 0:
        raise ConfigError(f"fresh_rank must not be negative, got {fresh_rank}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    options: dict[str, Any] = {  # each field has its own type
        "rank_cap": rank_cap,
        "seed": seed,
        "fresh_rank": fresh_rank,
        "workers": workers,
    }
    rule = RULES[name]
    return rule(**{field.name: options[field.name] for field in fields(rule)})
