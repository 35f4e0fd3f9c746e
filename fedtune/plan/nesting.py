"""Ranks nest: a device that can carry more has, in every matrix, at least a weaker one's rank.

All devices take prefixes of one order of rungs, from some layer up. So the ranks of two devices
nest if the prefix of the one ends no earlier and begins no higher. A device can carry more if it is
as good or better in all that its profile and the run file say of it. Of two devices of which each
is better in something, neither bounds the other. Nor does a device of a pinned rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fedtune.plan.candidates import Caps
from fedtune.plan.task import Choice, Task


def from_the_strongest(tasks: Sequence[Task]) -> Iterator[tuple[int, list[int]]]:
    """Every task's place, with the places before it that can carry more than it can.

    What can carry more than a device is stronger than whatever the device is stronger than, so
    fewer devices are stronger than it: in the order of that number, the strongest comes first.
    """
    stronger = [
        [
            other
            for other in range(len(tasks))
            if other != place and _carries_more(tasks, other, place)
        ]
        for place in range(len(tasks))
    ]
    settled: set[int] = set()
    for place in sorted(range(len(tasks)), key=lambda place: (len(stronger[place]), place)):
        yield place, [other for other in stronger[place] if other in settled]
        settled.add(place)


def caps_by(task: Task, choice: Choice) -> Caps:
    """What a choice leaves open to devices that can carry less."""
    return Caps(choice.end(task), choice.option.depth)


def common_caps(caps: Iterable[Caps]) -> Caps | None:
    """What all of them leave open; None if there are none."""
    found = list(caps)
    if not found:
        return None
    return Caps(min(each.end for each in found), max(each.depth for each in found))


def within(task: Task, choice: Choice, caps: Caps | None) -> bool:
    """Whether all rungs of a choice are open."""
    if caps is None:
        return True
    last = choice.ladder(task).positions[choice.length - 1]
    return last < caps.end and choice.option.depth >= caps.depth


def _carries_more(tasks: Sequence[Task], first: int, second: int) -> bool:
    """Whether one task's device is as good as another's in everything."""
    strong, weak = tasks[first], tasks[second]
    if strong.pins.rank or weak.pins.rank:
        return False
    return (
        all(a >= b for a, b in zip(_amounts(strong), _amounts(weak), strict=True))
        and set(strong.formats()) >= set(weak.formats())
        and set(strong.micro_batches()) >= set(weak.micro_batches())
        and strong.profile.accelerator == weak.profile.accelerator
        and strong.pins.correction_rank == weak.pins.correction_rank
    )


def _amounts(task: Task) -> tuple[float, ...]:
    """What a device has, more of which is better; what is not known counts as without limit."""
    profile, endless = task.profile, float("inf")
    rates = profile.matmul_flops_per_s
    slowest = max(rates.values(), default=0.0)
    return (
        profile.budget_bytes / task.calibration.bytes_factor,
        (rates.get("fp32", slowest) or endless) / task.calibration.seconds_factor,
        (rates.get("bf16", rates.get("fp32", slowest)) or endless),
        profile.memory_bandwidth_bytes_per_s or endless,
        1 / task.calibration.seconds_factor,
        profile.link_bytes_per_s or endless,
        task.upload_limit or endless,
        task.ladders.rank_max,
    )
