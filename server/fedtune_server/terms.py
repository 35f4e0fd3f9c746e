"""What stays the same in every round of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedtune.aggregate.defences import Defence
from fedtune.coding import CodecName
from fedtune.records import LoraScale, MatrixShape
from fedtune_server.policy import RoundPolicy


@dataclass(frozen=True, slots=True)
class RoundTerms:
    """What a round is told beside its number, its devices and the adapter.

    Attributes:
        weights: how much a device counts: by the `samples` that its site holds (FedAvg's n_k), by
            the `tokens` that carried loss in its round, or `uniform`.
        down, up: codecs of what devices are sent, and of what they send back.
        error_feedback: devices make up for what `up` took from their earlier updates.
        deadline_s: of what devices are asked beside rounds, in real seconds; and of rounds, unless
            their policy says otherwise.
        policy: when a round closes, and what becomes of late updates.
        max_norm: largest Frobenius norm that one matrix of an update may have.
        defence: whose update counts, of those that are good.
    """

    run: str
    base_digest: str
    shapes: Mapping[str, MatrixShape]
    scale: LoraScale
    down: CodecName
    up: CodecName
    weights: str
    minimum_devices: int
    deadline_s: float
    seed: int
    error_feedback: bool = False
    max_norm: float = 1e4
    defence: Defence = field(default_factory=Defence)
    policy: RoundPolicy = field(default_factory=RoundPolicy)

    @property
    def round_deadline_s(self) -> float:
        """Longest that a round waits, in seconds of its clock."""
        return self.deadline_s if self.policy.deadline_s is None else self.policy.deadline_s
