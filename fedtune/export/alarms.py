"""What in a run's events deserves a person's attention now.

Each alarm is given once, and again only after its cause had gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from fedtune.export.ledger_facts import Line, number
from fedtune.export.ledger_tail import line_time

RISING_ROUNDS = 3
"""Rounds in a row in which the held-out loss rises; one or two are noise of small held-out sets."""
REFUSED_ROUNDS = 3
"""Rounds in a row in which a device is refused."""
DROPPED_ENERGY = 0.05
"""Share of a matrix's energy that the rank cap cuts off; our choice."""
_SLACK = 3.0
_SHORTEST_WAIT_S = 60.0
"""Silence below this is none: devices that take turns report seldom."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One cause for attention.

    Attributes:
        name: `silence`, `gone`, `loss`, `refused`, `device`, `rank-cap`, or `replaced`.
        text: what it is and what to do, for a person.
    """

    name: str
    text: str


class Alarms:
    """Listens to the events of one run.

    Args:
        deadline_s: how long a round may take.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._last: datetime | None = None
        self._silent = False
        self._planned_s: float | None = None
        self._longest_s = 0.0
        self._losses: list[float] = []
        self._asked: set[str] = set()
        self._refused: set[str] = set()
        self._in_a_row: Counter[str] = Counter()
        self._dropping = False

    def hear(self, line: Line) -> Iterator[Alarm]:
        """Take one line of the ledger into account; the alarms that it gives."""
        self._hear_time(line)
        kind, device = line.get("kind"), str(line.get("device"))
        if kind == "planned":
            self._planned_s = number(line, "makespan_seconds")
        elif kind == "round_started":
            self._asked, self._refused = {str(name) for name in line.get("devices") or ()}, set()
        elif kind == "device_reported":
            self._in_a_row[device] = 0
        elif kind == "device_refused":
            yield from self._hear_refusal(line, device)
        elif kind == "round_finished":
            self._planned_s = number(line, "planned_seconds") or self._planned_s
            yield from self._hear_loss(line)
            yield from self._hear_cap(line)

    def silence(self, now: datetime) -> Alarm | None:
        """The alarm if no event has come for longer than expected, once."""
        if self._last is None or self._silent:
            return None
        waited, expected = (now - self._last).total_seconds(), self.expected_s
        if waited <= expected:
            return None
        self._silent = True
        return Alarm(
            "silence",
            f"no event for {waited:.0f} s, expected one within {expected:.0f} s; look whether the "
            "devices still work, and whether the network does",
        )

    @property
    def expected_s(self) -> float:
        """Within how many seconds the next event is expected.

        Before the plan devices may take the whole deadline to answer. After it, three times what
        the plan says of the slowest device, or three times the longest pause so far, if longer:
        devices that take turns on one machine take longer than planned.
        """
        if self._planned_s is None:
            return self.deadline_s
        usual = _SLACK * max(self._planned_s, self._longest_s)
        return min(max(usual, _SHORTEST_WAIT_S), self.deadline_s)

    def _hear_time(self, line: Line) -> None:
        time = line_time(line)
        if time is None:
            return
        began_again = line.get("kind") in ("run_started", "run_resumed")
        if self._last is not None and self._planned_s is not None and not began_again:
            self._longest_s = max(self._longest_s, (time - self._last).total_seconds())
        self._last, self._silent = time, False

    def _hear_refusal(self, line: Line, device: str) -> Iterator[Alarm]:
        self._refused.add(device)
        self._in_a_row[device] += 1
        reason = line.get("reason")
        if self._asked and self._refused >= self._asked:
            devices = "the only device" if len(self._asked) == 1 else f"all {len(self._asked)}"
            text = f"round {line.get('round')}: {devices} refused; the last, {device}: {reason}"
            yield Alarm("refused", text)
        elif self._in_a_row[device] == REFUSED_ROUNDS:
            yield Alarm("device", f"{device} was refused {REFUSED_ROUNDS} times running: {reason}")

    def _hear_loss(self, line: Line) -> Iterator[Alarm]:
        loss = number(line, "held_out_loss")
        if loss is None:
            return
        rises = bool(self._losses) and loss > self._losses[-1]
        self._losses = [*self._losses, loss] if rises else [loss]
        if len(self._losses) == RISING_ROUNDS + 1:
            yield Alarm(
                "loss",
                f"the held-out loss rose {RISING_ROUNDS} rounds running, {self._losses[0]:.4f} to "
                f"{loss:.4f}; lower train.learning_rate or train.local_steps, and look at the "
                "devices' cosines in: fedtune status",
            )

    def _hear_cap(self, line: Line) -> Iterator[Alarm]:
        share = number(line, "dropped_energy") or 0.0
        if share >= DROPPED_ENERGY and not self._dropping:
            yield Alarm(
                "rank-cap",
                f"round {line.get('round')}: the rank cap cut off {share:.1%} of the energy of a "
                "matrix; raise lora.rank_cap",
            )
        self._dropping = share >= DROPPED_ENERGY
