"""What stays the same in every round of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtune.records import LoraScale, MatrixShape
from fedtune.wire.packing import WireDtype
from fedtune_server.policy import RoundPolicy


@dataclass(frozen=True, slots=True)
class RoundTerms:
    """What a round is told beside its number, its devices and the adapter.

    Attributes:
        weights: how much a device counts: by the `samples` that its site holds (FedAvg's n_k), by
            the `tokens` that carried loss in its round, or `uniform`.
        deadline_s: of what devices are asked beside rounds, in real seconds; and of rounds, unless
            their policy says otherwise.
        policy: when a round closes, and what becomes of late updates.
        max_norm: largest Frobenius norm that one matrix of an update may have.
    """

    run: str
    base_digest: str
    shapes: Mapping[str, MatrixShape]
    scale: LoraScale
    wire_dtype: WireDtype
    weights: str
    minimum_devices: int
    deadline_s: float
    seed: int
    max_norm: float = 1e4
    policy: RoundPolicy = field(default_factory=RoundPolicy)

    @property
    def round_deadline_s(self) -> float:
        """Longest that a round waits, in seconds of its clock."""
        return self.deadline_s if self.policy.deadline_s is None else self.policy.deadline_s
