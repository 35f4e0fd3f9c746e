"""When a device is no longer what its plan took it for: a judgement, one round at a time.

A device that reports what it measures is compared with its plan. Nothing here plans, sends or
writes: `judge` takes what is held true of a device and what it says of its last round, and returns
what is held true now, and why it must be planned anew, if it must.

Loads come and go, and a fleet that is planned anew in each round learns less and costs solves. So

- seconds count when `SETTLED_ROUNDS` rounds in a row are off to the same side, by the factor that
  all of them agree on;
- memory that falls under the plan's peak counts at once, since the next round may not end; the new
  plan gets `MARGIN` less than what is left. Memory that comes back has to stay;
- after a new plan a device rests for `REST_ROUNDS`, but for falling memory. A new plan that takes
  back the one before it doubles the rest: a load that flaps slowly is followed ever less often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fedtune.records import DevicePlan, DeviceProfile

SETTLED_ROUNDS = 2
"""Rounds in a row that must agree; one slow round is no news on a machine that others use."""
REST_ROUNDS, LONGEST_REST = 4, 64
"""Rounds until a device may be planned anew, at first and at most. Chosen: four rounds at a wrong
pace cost less than a switch of formats, which quantises the base anew."""
MARGIN = 0.05
"""Of memory, above a new plan's peak. Chosen: free memory moves by a few per cent by itself."""
ENOUGH_ROOM = 0.1
"""Share by which memory must grow before it is worth a new plan."""
_PLAUSIBLE = 1e3
"""Most that a device may be off by; beyond it the report is not believed."""
_GRID = math.log(1.1)
"""Factors are rounded to powers of this, so that devices that slow down alike share a solve."""
_MOST_BYTES = 2**60

Cause: TypeAlias = Literal["time", "memory", "refusal", "fleet"]
"""What a new plan comes from; `fleet`: from the new plans of other devices."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a device measured in a round; None: not measured, or not believed.

    Attributes:
        step_seconds: of one optimiser step.
        free_bytes: what training may use on the device now, its own usage included.
    """

    step_seconds: float | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What is held true of a device in place of its profile, and what speaks against it.

    Attributes:
        budget_bytes: memory that its plans are held to.
        slowness: factor of the seconds that its profile predicts.
        ratios: measured over planned seconds of the last rounds, all off to the same side.
        room: memory that its plans could be held to, of the last rounds that had enough more.
        rests_until: first round that may end in a new plan.
        rest: rounds to rest after the next one.
        direction: what the last new plan did: 1 gave the device more to do, -1 less, 0: none yet.
    """

    budget_bytes: int
    slowness: float = 1.0
    ratios: tuple[float, ...] = ()
    room: tuple[int, ...] = ()
    rests_until: int = 0
    rest: int = REST_ROUNDS
    direction: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a device must be planned anew.

    Attributes:
        measured: seconds of a step for `time`, bytes for `memory` and `refusal`;
            no meaning for `fleet`.
        planned: the same by the plan.
    """

    cause: Cause
    measured: float
    planned: float


def reading(metrics: Mapping[str, float]) -> Reading:
    """What a device's report says of its time and memory; numbers that cannot be are left out."""
    seconds, free = metrics.get("step_seconds"), metrics.get("free_bytes")
    return Reading(
        step_seconds=seconds if _positive(seconds, math.inf) else None,
        free_bytes=int(free) if free is not None and _positive(free, _MOST_BYTES) else None,
    )


def planned_step_seconds(plan: DevicePlan, profile: DeviceProfile) -> float:
    """Seconds of one optimiser step by the plan; 0 where the profile has no rates."""
    transfer = 0.0
    if profile.link_bytes_per_s > 0:
        transfer = (plan.download_bytes + plan.upload_bytes) / profile.link_bytes_per_s
    return max(0.0, plan.seconds - transfer) / plan.local_steps


def judge(
    standing: Standing,
    said: Reading,
    *,
    round: int,
    peak_bytes: int,
    step_seconds: float,
    own_bytes: int,
    threshold: float,
) -> tuple[Standing, Finding | None]:
    """What is held true of a device after a round, and why it must be planned anew, if it must.

    Args:
        peak_bytes: of its plan.
        step_seconds: by its plan; 0: unknown.
        own_bytes: memory that the device had at first; its plans never get more.
        threshold: share of the planned seconds that the measured ones may be off by.
    """
    if said.free_bytes is not None and said.free_bytes < peak_bytes:
        return lowered(standing, said.free_bytes, "memory", round, peak_bytes)
    ratios = _ratios(standing, said, step_seconds, threshold)
    standing = replace(standing, ratios=ratios, room=_room(standing, said, own_bytes))
    if round < standing.rests_until:
        return standing, None
    if len(standing.ratios) == SETTLED_ROUNDS:
        factor = min(standing.ratios, key=lambda ratio: abs(math.log(ratio)))
        found = Finding("time", factor * step_seconds, step_seconds)
        slowness = _on_grid(standing.slowness * factor)
        direction = -1 if factor > 1 else 1
        return replace(_acted(standing, direction, round), slowness=slowness), found
    if len(standing.room) == SETTLED_ROUNDS:
        budget = min(standing.room)
        found = Finding("memory", budget, standing.budget_bytes)
        return replace(_acted(standing, 1, round), budget_bytes=budget), found
    return standing, None


def lowered(
    standing: Standing, free_bytes: int, cause: Cause, round: int, peak_bytes: int
) -> tuple[Standing, Finding]:
    """What is held true of a device that has less memory than its plan takes."""
    budget = max(1, int(free_bytes / (1 + MARGIN)))
    found = Finding(cause, free_bytes, peak_bytes)
    return replace(_acted(standing, -1, round), budget_bytes=budget), found


def _ratios(
    standing: Standing, said: Reading, planned: float, threshold: float
) -> tuple[float, ...]:
    """The last rounds' ratios with this one's, if it is off to the side that those are."""
    if said.step_seconds is None or planned <= 0:
        return standing.ratios
    ratio = said.step_seconds / planned
    if not 1 / _PLAUSIBLE <= ratio <= _PLAUSIBLE:
        return standing.ratios
    if abs(ratio - 1) <= threshold:
        return ()
    agreeing = [before for before in standing.ratios if (before > 1) == (ratio > 1)]
    return (*agreeing, ratio)[-SETTLED_ROUNDS:]


def _room(standing: Standing, said: Reading, own_bytes: int) -> tuple[int, ...]:
    """As `_ratios`, of memory that came back after it had fallen."""
    if said.free_bytes is None:
        return standing.room
    could = own_bytes
    if said.free_bytes < own_bytes:
        could = int(said.free_bytes / (1 + MARGIN))
    if could < (1 + ENOUGH_ROOM) * standing.budget_bytes:
        return ()
    return (*standing.room, could)[-SETTLED_ROUNDS:]


def _acted(standing: Standing, direction: int, round: int) -> Standing:
    """The standing after a new plan: nothing speaks against it yet, and it rests."""
    turned = standing.direction == -direction
    rest = min(2 * standing.rest, LONGEST_REST) if turned else standing.rest
    return replace(
        standing, ratios=(), room=(), rests_until=round + rest, rest=rest, direction=direction
    )


def _on_grid(factor: float) -> float:
    bounded = min(max(factor, 1 / _PLAUSIBLE), _PLAUSIBLE)
    return math.exp(_GRID * round(math.log(bounded) / _GRID))


def _positive(value: float | None, most: float) -> bool:
    return value is not None and math.isfinite(value) and 0 < value <= most
