"""What each device of a round starts from, as it is and as it travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.aggregate.rules import Rule
from fedtune.records import DevicePlan, Dispatch, GlobalAdapter
from fedtune.wire.tensors import as_received, pack_dispatch
from fedtune_server.terms import RoundTerms


@dataclass(frozen=True, slots=True)
class Sent:
    """One device's start of a round: as the device reads it out of its bytes, and those bytes."""

    dispatch: Dispatch
    packed: bytes


def prepare(
    rule: Rule, adapter: GlobalAdapter, plans: Sequence[DevicePlan], terms: RoundTerms, round: int
) -> dict[str, Sent]:
    """What each device starts from, rounded by the codec `down`.

    The generator starts alike for every device, so that fresh directions nest over ranks; devices
    whose matrices have the same ranks share one start.
    """
    made: dict[tuple[tuple[str, int, int], ...], Sent] = {}
    sent = {}
    for plan in plans:
        ranks = tuple((m.name, m.rank, m.tail_rank) for m in plan.matrices)
        if ranks not in made:
            made[ranks] = start_of(rule, adapter, plan, terms, round)
        sent[plan.device] = made[ranks]
    return sent


def start_of(
    rule: Rule, adapter: GlobalAdapter, plan: DevicePlan, terms: RoundTerms, round: int
) -> Sent:
    """What one device starts from; equal adapters and plans give equal bytes."""
    rng = np.random.default_rng([terms.seed, round])
    dispatch = rule.dispatch(adapter, plan, scale=terms.scale, rng=rng)
    packed = pack_dispatch(dispatch, terms.down)
    return Sent(as_received(packed, dispatch, plan, terms.scale), packed)
