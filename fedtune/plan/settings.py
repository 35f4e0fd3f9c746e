"""What the planner is told about a run, in plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedtune.plan.traffic import WireCosts
from fedtune.records import DeviceProfile, FormatName, TaskName

_FLOATS = WireCosts()


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What every device of a run shares.

    Attributes:
        rank_max: highest rank that a device trains.
        rank_cap: rank that the coordinator keeps; no device gets more tail than fills it up.
        tail: most frozen directions of the global adapter that a device gets per matrix beyond
            those it trains; True: up to `rank_cap`, False or 0: none.
        batch_size: samples of one optimiser step.
        local_steps: optimiser steps in a round.
        sequence_length: longest sample in tokens.
        checkpointing: whether activations may be recomputed to save memory.
        round_seconds: longest planned round; 0: no limit.
        wire: what a number costs in a message.
        dense_parameters: parameters that are trained whole (a task head).
        trainable: names of the matrices that may be trained; empty: all of them.
        task: decides whether logits have a row per token.
        whole_tail: every device gets all of the global adapter as its tail, apart from its trained
            directions, and has to carry it (`flora`).
        eager_attention: whether attention scores are kept in memory (not with fused kernels).
        correction_rank: highest rank of the frozen pair that may repair a quantised matrix.
        compute_itemsize: bytes of one activation; 0: as each device chooses for itself.
        upload_bytes: largest update of any device in a round; 0: no limit.
        makespan_weight: power of the round's seconds in what a plan is chosen by; 0: they do not
            count.
        gain_weight: power of the fleet's gain in it.
        steps: `planned`: a device may take fewer than `local_steps`; `equal`: only if
            `round_seconds` forces it to.
        shortest_sequence: a device that cannot carry `sequence_length` may cut samples down to
            this many tokens; 0: it may not.
        solver: `milp` refines the greedy plan by a mixed-integer program per kind of device.
        solver_seconds: longest time of all programs of a fleet.
        keeps_start: devices keep a copy of what a round starts from (FedProx).
    """

    rank_max: int
    rank_cap: int
    batch_size: int
    local_steps: int
    sequence_length: int
    tail: bool | int = False
    checkpointing: bool = True
    round_seconds: float = 0.0
    wire: WireCosts = _FLOATS
    dense_parameters: int = 0
    trainable: tuple[str, ...] = ()
    task: TaskName = "causal-lm"
    eager_attention: bool = False
    whole_tail: bool = False
    correction_rank: int = 0
    compute_itemsize: int = 4
    upload_bytes: int = 0
    makespan_weight: float = 0.0
    gain_weight: float = 1.0
    steps: Literal["planned", "equal"] = "planned"
    shortest_sequence: int = 0
    solver: Literal["greedy", "milp"] = "greedy"
    solver_seconds: float = 20.0
    keeps_start: bool = False

    def itemsize(self, profile: DeviceProfile) -> int:
        """Bytes of one activation on a device: the run's, or of the dtype that it chose itself."""
        return self.compute_itemsize or (2 if profile.compute in ("bf16", "fp16") else 4)

    @property
    def tail_max(self) -> int:
        """Most tail directions of a matrix, as a number."""
        return self.rank_cap if self.tail is True else int(self.tail)


@dataclass(frozen=True, slots=True)
class Pins:
    """What a run file fixes for the devices of one class; 0 or None leaves it to the planner.

    Attributes:
        rank: every trainable matrix gets this rank (less where the matrix is smaller).
        rank_max: own limit in place of the run's.
        format: the backbone's format.
        correction_rank: rank of the pair that repairs every matrix in a block format; 0: none.
        micro_batch: samples of one forward pass; divides the batch size.
        upload_bytes: largest update that a device sends in a round.
    """

    rank: int = 0
    rank_max: int = 0
    format: FormatName | None = None
    correction_rank: int | None = None
    micro_batch: int = 0
    upload_bytes: int = 0
