from __future__ import annotations

from collections.abc import Sequence

from fedtune.plan.fleet import FleetChoice, Kind


def refine(kinds: Sequence[Kind], choice: FleetChoice, seconds: float) -> FleetChoice:
    return choice
