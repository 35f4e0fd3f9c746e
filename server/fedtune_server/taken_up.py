"""Answers that came to a round before its coordinator was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.aggregate.rules import Rule
from fedtune.errors import ProtocolError
from fedtune.records import Contribution, DevicePlan, Event, GlobalAdapter
from fedtune_server.acceptance import accept_kept, reported
from fedtune_server.fleet import Fleet
from fedtune_server.open_round import OpenRounds
from fedtune_server.starts import prepare
from fedtune_server.terms import RoundTerms


@dataclass(frozen=True, slots=True)
class TakenUp:
    """What a round has before it asks anybody.

    Attributes:
        good: updates that passed the checks.
        events: tell of them.
        upload_bytes: of all their tensors.
    """

    good: tuple[Contribution, ...] = ()
    events: tuple[Event, ...] = ()
    upload_bytes: int = 0


NOTHING = TakenUp()


def take_up(
    rule: Rule,
    adapter: GlobalAdapter,
    plans: Sequence[DevicePlan],
    fleet: Fleet,
    terms: RoundTerms,
    round: int,
    open_rounds: OpenRounds,
) -> TakenUp:
    """Check the answers that lie on the disk as if they came now; those that are good.

    What their devices started from is made again: equal adapters and plans give equal starts. An
    answer that does not pass is dropped, and its device can be asked again.

    Args:
        plans: of devices that the round may ask.
    """
    by_device = {plan.device: plan for plan in plans}
    kept = open_rounds.kept(round, sorted(by_device))
    sent = prepare(rule, adapter, [by_device[device] for device in kept], terms, round)
    good: list[Contribution] = []
    events: list[Event] = []
    upload_bytes = 0
    for device, answer in kept.items():
        start = sent[device]
        try:
            each = accept_kept(answer, device, by_device[device], start, fleet, terms, round)
        except ProtocolError:
            open_rounds.drop(round, device)
            continue
        good.append(each)
        events.append(reported(each.update, len(start.packed), len(answer.tensors)))
        upload_bytes += len(answer.tensors)
    return TakenUp(tuple(good), tuple(events), upload_bytes)
