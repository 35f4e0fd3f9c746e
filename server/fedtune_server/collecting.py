"""Take the answers of a round as they come, those to earlier rounds among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from flwr.serverapp import Grid

from fedtune.errors import ProtocolError, RefusedUpdateError
from fedtune.records import Contribution, Event
from fedtune_server.acceptance import accept, reported
from fedtune_server.clock import FIRST_POLL_S, LONGEST_POLL_S
from fedtune_server.exchange import Answer
from fedtune_server.fleet import Emit, Fleet
from fedtune_server.flights import Flight, Flights
from fedtune_server.open_round import OpenRounds
from fedtune_server.returning import LOST
from fedtune_server.terms import RoundTerms


@dataclass(slots=True)
class Collected:
    """What has come in of a round so far.

    Attributes:
        good: device -> its update; a device counts once in a round.
        failed: devices that answered this round with an error instead of an update.
        troubled: those, and devices whose update was refused or did not come.
        lost: devices whose work of this round was lost, as Flower says: they are gone, or the
            process that did it is.
        took: device -> seconds from being asked to its update, which may be of an earlier round.
        silent: devices that did not answer in the time that they had.
        refused: answers that were not good, or did not come.
        upload_bytes: of all tensors that came.
    """

    round: int
    good: dict[str, Contribution] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    troubled: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    took: dict[str, float] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    refused: int = 0
    upload_bytes: int = 0

    @property
    def own(self) -> list[Contribution]:
        """Updates that answer this round, not an earlier one; by their devices' names."""
        return [each for each in self.in_order if each.update.round == self.round]

    @property
    def own_count(self) -> int:
        """How many those are; asked after every answer, so it sorts nothing."""
        return sum(each.update.round == self.round for each in self.good.values())

    @property
    def in_order(self) -> list[Contribution]:
        """All updates, by their devices' names."""
        return [self.good[name] for name in sorted(self.good)]


def collect(
    grid: Grid,
    flights: Flights,
    fleet: Fleet,
    terms: RoundTerms,
    collected: Collected,
    open_rounds: OpenRounds,
    emit: Emit,
    *,
    over: Callable[[], bool],
    after_each: Callable[[], None],
    tend: Callable[[], None] | None = None,
    ends: Callable[[], float] | None = None,
) -> None:
    """Add what comes to a round until it is over, or its deadline has passed.

    Args:
        over: whether the round needs no more; asked after every answer.
        after_each: called after every answer, such as to give the device new work.
        tend: called before each look for answers, such as to ask a device that is back.
        ends: when the round is to be over, by the flights' clock; default: at its deadline.
    """
    last = flights.clock.now() + terms.round_deadline_s
    for flight, answer in _arriving(
        grid, flights, collected, over, tend or _nothing, ends or (lambda: last)
    ):
        collected.upload_bytes += len(answer.tensors or b"")
        try:
            each = _judge(flight, answer, fleet, terms, collected, open_rounds)
        except ProtocolError as error:
            _refuse(flight, answer, str(error), collected, emit)
        else:
            collected.good[flight.device] = each
            collected.failed.discard(flight.device)
            collected.troubled.discard(flight.device)
            collected.lost.discard(flight.device)
            staleness = collected.round - flight.round
            collected.took[flight.device] = flights.clock.now() - flight.left
            downloaded, uploaded = len(flight.sent.packed), len(answer.tensors or b"")
            emit(reported(each.update, downloaded, uploaded, collected.round, staleness))
        after_each()


def _nothing() -> None:
    """Of a round whose devices stay."""


def _arriving(
    grid: Grid,
    flights: Flights,
    collected: Collected,
    over: Callable[[], bool],
    tend: Callable[[], None],
    ends: Callable[[], float],
) -> Iterator[tuple[Flight, Answer]]:
    clock, poll_s = flights.clock, FIRST_POLL_S
    while not over():
        tend()
        end = ends()
        in_time = clock.now() < end
        # A device whose update already counts in this round may be on its next work: that waits.
        found = flights.next(grid, collected.good, pull=in_time)
        if found is not None:
            poll_s = FIRST_POLL_S
            yield found
        elif not in_time:
            break
        else:
            clock.wait(poll_s, end)
            poll_s = min(poll_s * 1.5, LONGEST_POLL_S)
    while (found := flights.next(grid, flights.devices, pull=False)) is not None:
        yield found  # no update; it is not to wait for the next round, which may never come


def _judge(
    flight: Flight,
    answer: Answer,
    fleet: Fleet,
    terms: RoundTerms,
    collected: Collected,
    open_rounds: OpenRounds,
) -> Contribution:
    """What an answer adds to the round.

    Raises:
        ProtocolError: it is not good, or comes too late to count.
    """
    policy, staleness = terms.policy, collected.round - flight.round
    if staleness > 0 and not answer.failure:
        if policy.late == "refuse":
            raise RefusedUpdateError(
                f"update of {flight.device}: it came after round {flight.round} had closed"
            )
        if staleness > policy.staleness_limit:
            raise RefusedUpdateError(
                f"update of {flight.device}: expected one of at most {policy.staleness_limit} "
                f"rounds ago (rounds.staleness_limit), got one of {staleness} rounds ago"
            )
    each = accept(answer, flight.plan, flight.sent, fleet, terms, flight.round, open_rounds)
    return replace(each, factor=each.factor * policy.discount(staleness))


def _refuse(flight: Flight, answer: Answer, reason: str, collected: Collected, emit: Emit) -> None:
    collected.refused += 1
    staleness = collected.round - flight.round
    if answer.silent:
        collected.silent.add(flight.device)
    if staleness == 0:
        collected.troubled.add(flight.device)
        if answer.failure and not answer.silent:
            collected.failed.add(flight.device)
        if answer.code in LOST:
            collected.lost.add(flight.device)
    elif answer.failure:
        reason = f"its work of round {flight.round}: {reason}"
    fields = {"round": collected.round, "device": flight.device, "reason": reason}
    emit(Event("device_refused", fields))
