"""Devices whose work of a round was lost, and that may come back to do it.

Flower never delivers an instruction twice. One that a node had taken when it died is lost: the
link says so once it marks the node offline, or, where the node is back before that, only its new
activation tells. A device that is back within the round is asked again.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedtune_server.flights import Flights
from fedtune_server.presence import Live

MOST_TIMES = 3
"""That a device is asked in one round; one whose work is lost each time is not well."""


class Returning:
    """Who was lost in a round, and who of them is back.

    Args:
        lost: devices whose work of the round was lost, as answers tell; the round keeps it up.
    """

    def __init__(self, live: Live, flights: Flights, lost: set[str], round: int) -> None:
        self._live, self._flights, self._lost, self._round = live, flights, lost, round
        self._since: dict[str, float] = {}
        self._activated: dict[str, str] = {}
        self._times: dict[str, int] = {}

    def asked(self, devices: Iterable[str]) -> None:
        """Devices have been given their work."""
        here = self._live.presence.here()
        for device in devices:
            self._activated[device] = here.get(device, "")
            self._times[device] = self._times.get(device, 0) + 1
            self._lost.discard(device)
            self._since.pop(device, None)

    def back(self) -> tuple[str, ...]:
        """Devices whose work was lost and that are there again, by their names."""
        here = self._live.presence.here()
        restarted = {
            flight.device
            for flight in self._flights.of_round(self._round)
            if here.get(flight.device, "") not in ("", self._activated.get(flight.device))
            and self._may_ask(flight.device)
        }
        for device in restarted:  # so soon that the link never called it offline
            self._flights.drop(device)
        # A look from before the loss would still show the device that is gone.
        seen = [d for d in self._waited_for() if self._since[d] < self._live.presence.looked]
        return tuple(sorted(d for d in {*seen, *restarted} if d in here and self._may_ask(d)))

    def end(self) -> float | None:
        """Until when, by the flights' clock, the round waits for the last of them; None: nobody."""
        waited_for = [d for d in self._waited_for() if self._may_ask(d)]
        return max((self._since[d] + self._live.return_s for d in waited_for), default=None)

    def _waited_for(self) -> list[str]:
        now = self._flights.clock.now()
        for device in self._lost:
            self._since.setdefault(device, now)
        return [d for d in self._lost if now - self._since[d] < self._live.return_s]

    def _may_ask(self, device: str) -> bool:
        return self._times.get(device, 0) < MOST_TIMES
