"""What a run file tells the planner, in the planner's own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.traffic import WireCosts, wire_costs
from fedtune.records import MatrixShape
from fedtune.sections.federation import WireSection
from fedtune.settings import RunConfig

NO_CAP = 4096
"""Highest rank that a message may name."""

_ITEMSIZES = {"auto": 0, "fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one activation; 0: as each device chooses for itself."""

Tail = Literal["planned", "none", "whole"]
"""What a rule sends of the joined adapter beside the directions that are trained."""


def plan_settings(
    config: RunConfig,
    dense_parameters: int,
    tail: Tail,
    matrices: Sequence[MatrixShape] = (),
) -> PlanSettings:
    """What every device of the run shares.

    Args:
        dense_parameters: parameters that are trained whole (a task head).
        tail: as the aggregation rule has it.
        matrices: those that may be trained; they decide what scales and names cost in a message.
    """
    whole = tail == "whole"
    tails = {"planned": config.lora.tail_rank, "none": 0, "whole": NO_CAP}
    return PlanSettings(
        rank_max=config.lora.rank_max,
        rank_cap=NO_CAP if whole else config.lora.rank_cap,
        tail=tails[tail],
        batch_size=config.train.batch_size,
        local_steps=config.train.local_steps,
        sequence_length=config.data.max_tokens,
        checkpointing=config.plan.checkpointing,
        round_seconds=config.plan.round_seconds,
        wire=_wire(config.wire, matrices),
        dense_parameters=dense_parameters,
        task=config.model.task,
        whole_tail=whole,
        correction_rank=config.plan.correction_rank,
        compute_itemsize=_ITEMSIZES[config.train.compute],
        upload_bytes=config.plan.max_bytes,
        makespan_weight=config.plan.makespan_weight,
        gain_weight=config.plan.gain_weight,
        steps=config.plan.steps,
        shortest_sequence=config.plan.shortest_sequence,
        solver=config.plan.solver,
        solver_seconds=config.plan.solver_seconds,
        keeps_start=config.train.proximal > 0,
    )


def _wire(section: WireSection, matrices: Sequence[MatrixShape]) -> WireCosts:
    feedback = section.error_feedback
    return wire_costs(section.down, section.up, matrices, error_feedback=feedback)


def plan_pins(config: RunConfig) -> Mapping[str, Pins]:
    """Device class -> what the run file fixes for it."""
    return {
        name: Pins(
            rank=section.rank,
            rank_max=section.rank_max,
            format=section.format,
            correction_rank=section.correction_rank,
            micro_batch=section.micro_batch,
            upload_bytes=section.upload,
        )
        for name, section in config.fleet.items()
    }
