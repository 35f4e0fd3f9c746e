"""Whom a round asks, and when it has heard enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedtune.errors import RoundError
from fedtune.records import DevicePlan, DeviceProfile, Event
from fedtune.wire.flower import TRAIN
from fedtune_server.collecting import Collected
from fedtune_server.fleet import Emit
from fedtune_server.flights import Flights, WorkOfRound
from fedtune_server.presence import LOOK_S, Live
from fedtune_server.returning import Returning, asked_again
from fedtune_server.sampling import Draw
from fedtune_server.terms import RoundTerms

PlanAnew = Callable[[tuple[str, ...]], Mapping[str, DevicePlan]]
"""Devices that answered with an error -> the plans of all devices from now on."""


class Asking:
    """Whom a round asks, at its start and as answers come, and when it has heard enough.

    Attributes:
        now: devices asked in the attempt that is being played.
        all: devices asked in the round, and those whose updates were there already.
        planned_seconds: of the slowest of them, by its plan.
        download_bytes: sent to them so far.
    """

    def __init__(
        self,
        plans: Sequence[DevicePlan],
        draw: Draw,
        flights: Flights,
        collected: Collected,
        terms: RoundTerms,
        send: Callable[[Sequence[DevicePlan]], int],
        emit: Emit,
        already: Sequence[Event] = (),
        live: Live | None = None,
        profiles: Mapping[str, DeviceProfile] | None = None,
    ) -> None:
        """What a round asks with.

        Args:
            already: tell of the updates that `collected` holds from before an interruption.
            live: where devices come and go; None: all are always there.
            profiles: of the devices, by which `live` says how long they may take.
        """
        self._plans: Mapping[str, DevicePlan] = {plan.device: plan for plan in plans}
        self._draw, self._flights, self._collected = draw, flights, collected
        self._terms, self._send, self._emit, self._already = terms, send, emit, already
        self._attempt = 0
        self._wide = terms.policy.mode == "async"
        self._enough = 0
        self._live, self._profiles = live, profiles or {}
        self._returning = (
            Returning(
                live.presence,
                live.return_s,
                WorkOfRound(flights, collected.round),
                collected.lost,
            )
            if live is not None
            else None
        )
        self._ends: dict[str, float] = {}
        self._last = 0.0
        self.now: set[str] = set()
        self.all: set[str] = set(collected.good)
        self.planned_seconds = 0.0
        self.download_bytes = 0

    def begin(self, attempt: int) -> None:
        """Ask the devices of an attempt, none of which is at work or has its update counted."""
        self._attempt, round = attempt, self._collected.round
        self.now = set()
        self._flights.expire()
        self._ends = {}
        self._await_enough()
        busy = self._flights.devices
        if attempt == 0:
            count = max(0, self._draw.count - len(busy)) if self._wide else self._draw.count
            free = [name for name in self._there(self._plans) if name not in busy]
            chosen: tuple[str, ...] = ()
            if count or not self._draw.count:
                chosen = self._draw.choose(free, round, count=count)
            fields = {
                "round": round,
                "devices": list(chosen),
                "allowed_seconds": self._allowed(chosen) if self._live is not None else None,
            }
            self._emit(Event("round_started", fields))
            for event in self._already:
                self._emit(event)
        else:
            chosen = self._chosen(self._missing())
            fields = {
                "round": round,
                "attempt": attempt + 1,
                "devices": list(chosen),
                "good": len(self._collected.good),
            }
            self._emit(Event("round_repeated", fields))
        self._ask(chosen)
        self._last = self._flights.clock.now() + self._terms.round_deadline_s
        if attempt == 0:
            asked = self._concurrency if self._wide else len(chosen)
            self._enough = self._terms.policy.enough(asked, self._terms.minimum_devices)

    @property
    def _concurrency(self) -> int:
        """Devices at work at the same time where rounds do not wait."""
        return self._draw.count or len(self._plans)

    def refill(self) -> None:
        """Give the work of a device that has answered to the next, where rounds do not wait."""
        if not self._wide or self.over():
            return
        wanted = self._concurrency - len(self._flights.devices)
        if wanted > 0:
            self._ask(self._chosen(wanted))

    def over(self) -> bool:
        """Whether the round need not wait for more."""
        good = self._collected.good
        if self._wide:
            return len(good) >= self._enough or self._flights.over(good)
        if self._returning is not None and self._returning.end() is not None:
            return self._collected.own_count >= self._enough
        if not self.now:  # nobody was free; those that are late can still make up the minimum
            return len(good) >= self._terms.minimum_devices or self._flights.over(good)
        own, round = self._collected.own_count, self._collected.round
        return own >= self._enough or not self._flights.any_of(round)

    def take_new_plans(self, plan_anew: PlanAnew | None) -> None:
        """Take new plans, if there are any, before the next attempt."""
        if plan_anew is not None and self._collected.failed:
            anew = plan_anew(tuple(sorted(self._collected.failed)))
            self._plans = {name: anew.get(name, plan) for name, plan in self._plans.items()}
            self._collected.failed.clear()

    def name_late(self) -> int:
        """Tell of the devices that the round has closed without; how many they are."""
        if self._wide:
            return 0
        late = self._flights.of_round(self._collected.round)
        now = self._flights.clock.now()
        for flight in late:
            fields = {"round": flight.round, "device": flight.device, "seconds": now - flight.left}
            self._emit(Event("device_late", fields))
        return len(late)

    def _missing(self) -> int:
        """Devices to ask when a round is played again; 0: all."""
        if not self._draw.count:
            return 0
        pending = len(self._flights.of_round(self._collected.round))
        return max(1, self._draw.count - self._collected.own_count - pending)

    def _chosen(self, count: int) -> tuple[str, ...]:
        """Devices that are free, and whose update would be a new one.

        A late update leaves its device free for this round's work only where rounds do not wait:
        a device counts once in a round, and the second update would wait for the next.
        """
        collected = self._collected
        taken = self._flights.devices | self.now | self._own
        if not self._wide:
            taken |= collected.good.keys()
        free = [name for name in self._there(self._plans) if name not in taken]
        return self._draw.choose(
            free, collected.round, self._attempt, count=count, last=collected.troubled
        )

    @property
    def _own(self) -> frozenset[str]:
        return frozenset(each.update.device for each in self._collected.own)

    def _ask(self, chosen: Sequence[str]) -> None:
        """Give devices their work, but for those whose updates are there already."""
        self.all.update(chosen)
        plans = [self._plans[name] for name in chosen]
        self.planned_seconds = max([self.planned_seconds, *(plan.seconds for plan in plans)])
        own = self._own
        asked = [plan for plan in plans if plan.device not in own]
        self.now.update(plan.device for plan in asked)
        if self._returning is not None:
            self._returning.asks(plan.device for plan in asked)
        if asked:
            self.download_bytes += self._send(asked)
        if self._returning is not None:
            left = self._flights.clock.now()
            allowed = self._allowed([plan.device for plan in asked])
            self._ends |= {name: left + seconds for name, seconds in allowed.items()}

    # ------------------------------------------------------------ devices that come and go

    def allowed_s(self, plan: DevicePlan) -> float:
        """How long a device may take, in seconds."""
        if self._live is None:
            return self._terms.round_deadline_s
        return self._live.allowances.seconds(plan, self._profiles[plan.device])

    def tend(self) -> None:
        """Ask those again that are back after their work was lost."""
        if self._returning is None:
            return
        if self._wide:
            self._returning.back()  # their flights are over, and they count as free
            self.refill()
            return
        for device in self._returning.back():
            self._emit(asked_again(device, TRAIN, self._collected.round))
            self._ask([device])

    def ends(self) -> float:
        """When the round is to be over, by the flights' clock."""
        if self._returning is None or not self._ends:
            return self._last
        returns = self._returning.end()
        return min(self._last, max([*self._ends.values(), *([returns] if returns else [])]))

    def _allowed(self, devices: Sequence[str]) -> dict[str, float]:
        return {name: self.allowed_s(self._plans[name]) for name in devices}

    def _there(self, names: Iterable[str]) -> list[str]:
        """Those of some devices that can be reached."""
        if self._live is None:
            return list(names)
        here = self._live.presence.here()
        return [name for name in names if name in here]

    def _await_enough(self) -> None:
        """Wait until the round can come to enough updates.

        Raises:
            RoundError: too few devices came in time.
        """
        if self._live is None:
            return
        clock, least = self._flights.clock, self._terms.minimum_devices
        end = clock.now() + self._live.patience_s
        told: list[str] | None = None
        while True:
            good, busy = self._collected.good.keys(), self._flights.devices
            here = sorted(set(self._there(self._plans)) | busy | good)
            if len(here) >= least:
                break
            missing = sorted(self._plans.keys() - set(here))
            if clock.now() >= end:
                raise RoundError(
                    f"round {self._collected.round} needs {least} devices, found "
                    f"{', '.join(here) or 'none'} within {self._live.patience_s:g} s "
                    f"(deployment.deadline_s); missing: {', '.join(missing[:10])}"
                )
            if told != here:
                told = here
                fields = {"round": self._collected.round, "needed": least}
                self._emit(Event("round_waits", fields | {"here": here, "missing": missing}))
            clock.wait(LOOK_S / 2, end)
