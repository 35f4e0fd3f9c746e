"""What the parts of a coordinator are told, out of the run's settings."""

from __future__ import annotations

from fedtune.aggregate.defences import Defence
from fedtune.aggregate.server_step import ServerStep
from fedtune.records import LoraScale, ModelShapes, TrainingWay
from fedtune.settings import RunConfig
from fedtune.wire.messages import OptimizerSpec
from fedtune_server.clock import Clock
from fedtune_server.policy import RoundPolicy
from fedtune_server.schedule import learning_rate
from fedtune_server.terms import RoundTerms

_REAL_DEADLINE_S = 3600.0
"""Longest wait for a device in a simulation whose rounds go by a virtual clock."""


def round_terms(
    config: RunConfig, shapes: ModelShapes, run: str, clock: Clock | None, patience: float
) -> RoundTerms:
    """What all rounds of a run have in common.

    Args:
        run: its id.
        clock: that rounds go by; None: this machine's.
        patience: how many times `run.round_deadline_s` a round may take.
    """
    return RoundTerms(
        run=run,
        base_digest=shapes.digest,
        shapes=shapes.by_name(),
        scale=LoraScale(config.lora.scale, config.lora.scaling),
        down=config.wire.down,
        up=config.wire.up,
        error_feedback=config.wire.error_feedback,
        weights=config.aggregate.weights,
        minimum_devices=config.run.minimum_devices,
        deadline_s=_deadline_s(config, clock) * patience,
        seed=config.run.seed,
        defence=Defence(**config.defence.model_dump()),
        policy=_policy(config, clock),
    )


def optimizer_spec(config: RunConfig, number: int) -> OptimizerSpec:
    """How devices step in a round, counted from 1."""
    train = config.train
    rounds_total = config.run.rounds

    def rate(progress: float) -> float:
        share = train.final_learning_rate_share
        return learning_rate(train.learning_rate, share, progress, train.schedule)

    return OptimizerSpec(
        name=train.optimizer,
        learning_rate=rate((number - 1) / rounds_total),
        final_learning_rate=rate(number / rounds_total),
        weight_decay=train.weight_decay,
        beta1=train.beta1,
        beta2=train.beta2,
        max_gradient_norm=train.max_gradient_norm,
        keep=train.keep_optimizer,
        proximal=train.proximal,
        way=TrainingWay(
            name=train.way,
            start=config.lora.start,
            layer_rate_decay=train.layer_rate_decay,
            flops_share=train.flops_share,
            allora_eta=train.allora_eta,
            channels=train.channels,
            seed=config.run.seed,
        ),
    )


def server_step(config: RunConfig) -> ServerStep:
    """The server's optimiser as the run file has it."""
    settings = config.aggregate
    return ServerStep(
        rank_cap=config.lora.rank_cap,
        step=settings.server_step,
        momentum=settings.momentum,
        optimizer=settings.optimizer,
        beta2=settings.beta2,
        adaptivity=settings.adaptivity,
        keep_dropped=settings.keep_dropped,
    )


def _deadline_s(config: RunConfig, clock: Clock | None) -> float:
    """Longest wait for what devices are asked beside rounds; those may go by another clock."""
    virtual = clock is not None and clock.virtual
    return _REAL_DEADLINE_S if virtual else config.run.round_deadline_s


def _policy(config: RunConfig, clock: Clock | None) -> RoundPolicy:
    """When rounds close. Only differences can be folded into a later round exactly."""
    rounds = config.rounds
    return RoundPolicy(
        mode=rounds.mode,
        close_count=rounds.close_count,
        close_fraction=rounds.close_fraction,
        late=rounds.late if config.aggregate.rule == "delta" else "refuse",
        staleness_limit=rounds.staleness_limit,
        staleness_power=rounds.staleness_power,
        repeats=rounds.repeats,
        deadline_s=config.run.round_deadline_s if clock is not None and clock.virtual else None,
    )
