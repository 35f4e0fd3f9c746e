"""Instructions on their way: sent to a device, and not yet answered.

A round may close before all its devices have answered. Their flights stay open, so that what they
send later still meets the plan and the start that it answers, and so that a device at work is not
given more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.records import DevicePlan
from fedtune.wire.flower import TRAIN
from fedtune_server.clock import Clock, RealClock
from fedtune_server.exchange import (
    Answer,
    lost_answer,
    post,
    read_answer,
    silent_answer,
    unsent_answer,
)
from fedtune_server.starts import Sent

_MOST_BYTES = 256 << 20
"""Of replies that are fetched at once, if each is as large as what it answers; chosen. Flower's
grid holds a reply three times while it comes."""


@dataclass(frozen=True, slots=True)
class Flight:
    """One instruction to train.

    Attributes:
        node: Flower node id of the device.
        plan: what the device is to do.
        sent: what it starts from.
        left: when it was sent, by the flights' clock.
        ttl_s: how long the device may take, in seconds.
    """

    device: str
    node: int
    round: int
    plan: DevicePlan
    sent: Sent
    left: float
    ttl_s: float


class Flights:
    """All flights of a run, over its rounds; a device has one at a time.

    Args:
        clock: by which they are due; default: this machine's.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or RealClock()
        self._open: dict[str, Flight] = {}
        self._landed: list[tuple[Flight, Answer]] = []

    @property
    def devices(self) -> frozenset[str]:
        """Devices that are at work, or whose update has not been taken."""
        landed = (flight for flight, answer in self._landed if not answer.failure)
        return frozenset(flight.device for flight in (*self._open.values(), *landed))

    def over(self, skip: Collection[str] = ()) -> bool:
        """Whether nothing more can come, but from some devices."""
        failed = any(answer.failure for _, answer in self._landed)
        return not failed and self.devices <= frozenset(skip)

    def any_of(self, round: int) -> bool:
        """Whether a flight of a round is not over."""
        return any(flight.round == round for flight in self._pending())

    def of_round(self, round: int) -> list[Flight]:
        """Flights of a round that are not over, by their devices' names."""
        return sorted((f for f in self._pending() if f.round == round), key=lambda f: f.device)

    def _pending(self) -> Iterator[Flight]:
        yield from self._open.values()
        yield from (flight for flight, _ in self._landed)

    def send(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        contents: Mapping[str, RecordDict],
        plans: Mapping[str, DevicePlan],
        sent: Mapping[str, Sent],
        round: int,
        ttl_s: Mapping[str, float],
    ) -> None:
        """Send each device its instruction.

        Args:
            ttl_s: device -> how long it may take, in seconds.
        """
        left = self.clock.now()
        lives_s = {name: seconds + self.clock.slack_s for name, seconds in ttl_s.items()}
        ids = post(grid, contents, nodes, kind=TRAIN, group=str(round), ttl_s=lives_s)
        flights = {
            name: Flight(name, nodes[name], round, plans[name], sent[name], left, ttl_s[name])
            for name in sorted(contents)
        }
        self._open |= {message_id: flights[name] for message_id, name in ids.items()}
        for name in sorted(flights.keys() - set(ids.values())):
            self._landed.append((flights[name], unsent_answer(name)))

    def drop(self, device: str) -> list[Flight]:
        """Forget what a device was sent, and has not answered: it is lost, and so is its answer."""
        ids = [i for i, flight in self._open.items() if flight.device == device]
        return [self._open.pop(i) for i in ids]

    def give_up(self, device: str, reason: str) -> None:
        """As `drop`; an answer then says that the device's work was lost."""
        self._landed += [(flight, lost_answer(device, reason)) for flight in self.drop(device)]

    def unanswered(self, round: int) -> list[str]:
        """Devices that were sent work of a round and have not answered, by their names."""
        return sorted(flight.device for flight in self._open.values() if flight.round == round)

    def next(
        self, grid: Grid, skip: Collection[str], *, pull: bool
    ) -> tuple[Flight, Answer] | None:
        """The next answer, in the order of arrival; None: there is none now.

        A device that did not answer in time gives a silent one. Each flight has one answer; a
        further one to the same message is a failure of its own.

        Args:
            skip: devices whose updates have to wait; what is no update does not wait.
            pull: whether to look for answers that have come since.
        """
        now = self.clock.now()
        found = self._take(skip)
        if found is None and pull:
            self._fetch(grid, skip)
            found = self._take(skip)
        if found is None:
            self._expire(now)
            found = self._take(skip)
        return found

    def _take(self, skip: Collection[str]) -> tuple[Flight, Answer] | None:
        for position, (flight, answer) in enumerate(self._landed):
            if answer.failure or flight.device not in skip:
                return self._landed.pop(position)
        return None

    def _fetch(self, grid: Grid, skip: Collection[str]) -> None:
        ids = [i for i, flight in self._open.items() if flight.device not in skip]
        answered: dict[str, Flight] = {}
        for reply in self._pulled(grid, ids):
            message_id = reply.metadata.reply_to_message_id
            if message_id in answered:
                again = answered[message_id]
                failure = f"{again.device} answered twice; its first answer counts"
                self._landed.append((again, Answer(again.device, failure=failure)))
            elif message_id in self._open:
                flight = answered[message_id] = self._open.pop(message_id)
                answer = read_answer(flight.device, flight.node, reply, TRAIN)
                self._landed.append((flight, answer))

    def _pulled(self, grid: Grid, ids: Sequence[str]) -> Iterable[Message]:
        """Replies to some messages that are there; of large ones only a few, for memory's sake."""
        group: list[str] = []
        held = 0
        for message_id in ids:
            size = len(self._open[message_id].sent.packed)
            if group and held + size > _MOST_BYTES:
                if replies := list(grid.pull_messages(group)):
                    return replies
                group, held = [], 0
            group.append(message_id)
            held += size
        return list(grid.pull_messages(group)) if group else ()

    def expire(self) -> None:
        """Give up those whose time is over: their devices are free, as far as one can know."""
        self._expire(self.clock.now())

    def _expire(self, now: float) -> None:
        for message_id, flight in list(self._open.items()):
            if now >= flight.left + flight.ttl_s:
                del self._open[message_id]
                self._landed.append((flight, silent_answer(flight.device, flight.ttl_s)))


@dataclass(frozen=True, slots=True)
class WorkOfRound:
    """The flights of one round, as devices that return are looked for (`returning.Work`)."""

    flights: Flights
    round: int

    @property
    def clock(self) -> Clock:
        return self.flights.clock

    def unanswered(self) -> list[str]:
        return self.flights.unanswered(self.round)

    def drop(self, device: str) -> None:
        self.flights.drop(device)

    def give_up(self, device: str, reason: str) -> None:
        self.flights.give_up(device, reason)
