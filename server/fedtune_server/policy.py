"""When a round closes, and what becomes of the updates that come later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """The rules that one round goes by; docs/rounds.md tells them to users.

    Attributes:
        mode: `sync`: a round waits for the devices that it asked itself; `async`: for a number of
            updates of any round.
        close_count: reports after which a round closes; 0: `close_fraction` says.
        close_fraction: share of the devices asked after whose reports it closes.
        late: what happens to an update that comes after its round has closed.
        staleness_limit: rounds by which it may be late and still count.
        staleness_power: of its discount.
        repeats: times that a round of too few good updates is played again.
        deadline_s: of a round, by its clock; None: that of the terms.
    """

    mode: Literal["sync", "async"] = "sync"
    close_count: int = 0
    close_fraction: float = 1.0
    late: Literal["fold", "refuse"] = "refuse"
    staleness_limit: int = 2
    staleness_power: float = 0.5
    repeats: int = 2
    deadline_s: float | None = None

    def enough(self, asked: int, minimum: int) -> int:
        """Reports after which a round of so many devices closes."""
        # A share such as 0.7 of 10 may come out a little above 7.
        count = self.close_count or math.ceil(self.close_fraction * asked - 1e-9)
        return max(minimum, min(count, asked))

    def ttl_s(self, deadline_s: float) -> float:
        """How long a device may take to answer, in seconds: while its update could still count."""
        rounds = 1 + self.staleness_limit if self.late == "fold" else 1
        return deadline_s * rounds

    def discount(self, staleness: int) -> float:
        """What the difference of a late update is multiplied by, (1 + s)^-power.

        Source: the polynomial discount of FedAsync (Xie et al. 2019, arXiv 1903.03934, section
        5.2), which FedBuff takes with power 1/2 (Nguyen et al. 2022, arXiv 2106.06639, section 5).
        """
        return float((1 + staleness) ** -self.staleness_power)
