"""What a round's defence leaves of its good updates, told as events."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedtune.aggregate.defences import Defence, Verdict, judge
from fedtune.errors import RunError
from fedtune.records import Contribution, Event
from fedtune_server.fleet import Emit


def defend(
    good: Sequence[Contribution], defence: Defence, round: int, emit: Emit
) -> Sequence[Contribution]:
    """What is joined: with the weights and factors that the defence gives.

    How the updates lie to each other is told whatever the method, as long as there are two. One
    that is left out is one more `device_refused`.

    Raises:
        RoundError: the update is missing that the method compares with.
    """
    judged = judge(good, defence)
    if judged.note:
        emit(Event("warning", {"text": f"round {round}: {judged.note}"}))
    for verdict in judged.verdicts:
        if verdict.reason:
            fields = {"round": round, "device": verdict.device, "reason": verdict.reason}
            emit(Event("device_refused", fields))
    if len(good) > 1:
        devices = [_entry(verdict) for verdict in judged.verdicts]
        fields = {"round": round, "method": defence.method, "devices": devices}
        emit(Event("updates_compared", fields))
    return judged.kept


def check_root(defence: Defence, names: Collection[str]) -> None:
    """Refuse a fleet without the site that it is to be compared with.

    Raises:
        RunError: the root site is not among the devices.
    """
    if defence.method == "root-cosine" and defence.root_site not in names:
        raise RunError(
            f"defence.root_site must be one of the devices that take part "
            f"({', '.join(sorted(names))}), got {defence.root_site!r}"
        )


def _entry(verdict: Verdict) -> dict[str, object]:
    entry: dict[str, object] = {
        "device": verdict.device,
        "length": verdict.length,
        "cosine": verdict.cosine,
        "share": verdict.share,
        "factor": verdict.factor,
    }
    return entry if verdict.trust is None else {**entry, "trust": verdict.trust}
