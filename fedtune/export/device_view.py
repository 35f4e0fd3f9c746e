"""What became of each device of a run, from the events that name it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedtune.export.ledger_facts import LedgerFacts, Line, number


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device, at a moment of a run.

    Attributes:
        format: of its backbone, in words; this and the ranks are of the plan in force.
        last_round: in which its update counted last; 0: never.
        held_out_loss: on its own rows, before that round.
        length: Frobenius norm of its last compared update.
        cosine: of that update with the joined one.
        share: weight that it had.
        refused: its updates that were not usable.
        late: its updates that came after their round had closed, and counted in a later one.
    """

    device: str
    device_class: str
    format: str
    rank_min: int
    rank_max: int
    trained_matrices: int
    last_round: int
    held_out_loss: float | None
    train_loss: float | None
    length: float | None
    cosine: float | None
    share: float | None
    refused: int
    refused_round: int
    refused_reason: str
    late: int


def device_views(facts: LedgerFacts, lines: Sequence[Line]) -> tuple[DeviceView, ...]:
    """Every device that said what it is, was planned, or reported; the planned ones first.

    Each event is looked at a fixed number of times, however many devices there are.
    """
    plans, compared = plans_in_force(facts), _compared(lines)
    reported, refused = _last_rounds(facts.reports), _last_rounds(facts.refusals)
    refusals = Counter(_devices_of("device_refused", lines))
    late = Counter(_late(lines))
    views = []
    for name in dict.fromkeys((*facts.devices, *facts.sites, *refusals)):
        plan, seen = plans.get(name, {}), compared.get(name, {})
        report = facts.reports.get((reported.get(name, 0), name), {})
        site = facts.sites.get(name, {})
        view = DeviceView(
            device=name,
            device_class=str(plan.get("device_class") or site.get("device_class") or ""),
            format=str(plan.get("format", "")),
            rank_min=int(number(plan, "rank_min") or 0),
            rank_max=int(number(plan, "rank_max") or 0),
            trained_matrices=int(number(plan, "trained_matrices") or 0),
            last_round=reported.get(name, 0),
            held_out_loss=number(report, "loss_before"),
            train_loss=number(report, "train_loss"),
            length=number(seen, "length"),
            cosine=number(seen, "cosine"),
            share=number(seen, "share"),
            refused=refusals[name],
            refused_round=refused.get(name, 0),
            refused_reason=facts.refusals.get((refused.get(name, 0), name), ""),
            late=late[name],
        )
        views.append(view)
    return tuple(views)


def plans_in_force(facts: LedgerFacts) -> dict[str, Line]:
    """Device -> its planned row, with what later plans changed of it."""
    plans = {str(plan.get("device")): dict(plan) for plan in facts.plans}
    for (_, device), event in sorted(facts.replans.items(), key=lambda item: item[0]):
        changed = event.get("changed")
        if isinstance(changed, Mapping):
            plans.setdefault(device, {}).update(
                (key, pair[1])
                for key, pair in changed.items()
                if isinstance(pair, (list, tuple)) and len(pair) == 2
            )
    return dict(plans)


def _compared(lines: Sequence[Line]) -> dict[str, Line]:
    """Device -> what the last comparison of updates said of it."""
    found: dict[str, Line] = {}
    for line in lines:
        if line.get("kind") == "updates_compared":
            entries = (each for each in line.get("devices") or () if isinstance(each, Mapping))
            found |= {str(each.get("device")): each for each in entries}
    return found


def _last_rounds(events: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Device -> the last round in which something happened to it."""
    return {device: round for round, device in sorted(events)}


def _devices_of(kind: str, lines: Sequence[Line]) -> Iterator[str]:
    return (str(line.get("device")) for line in lines if line.get("kind") == kind)


def _late(lines: Sequence[Line]) -> Iterator[str]:
    """The device of every update that was trained on an older adapter than it was joined with."""
    late = [line for line in lines if (number(line, "staleness") or 0) > 0]
    return _devices_of("device_reported", late)
