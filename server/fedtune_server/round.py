"""One round: send devices their work, check what comes back, join what is good."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedtune.aggregate.rules import Rule
from fedtune.errors import RoundError
from fedtune.records import Contribution, DevicePlan, Event, GlobalAdapter
from fedtune.wire.flower import TRAIN, to_record
from fedtune.wire.messages import OptimizerSpec, TrainInstruction, encode_train_instruction
from fedtune.wire.packing import tensors_digest
from fedtune_server.asking import Asking, PlanAnew
from fedtune_server.collecting import Collected, collect
from fedtune_server.defend import defend
from fedtune_server.evaluation import weighted
from fedtune_server.fleet import Emit, Fleet
from fedtune_server.flights import Flights
from fedtune_server.open_round import OpenRounds
from fedtune_server.presence import Live
from fedtune_server.sampling import Draw
from fedtune_server.starts import prepare
from fedtune_server.taken_up import NOTHING, TakenUp
from fedtune_server.terms import RoundTerms


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to.

    Attributes:
        joined: the adapter with all good updates in it.
        held_out_loss: of the adapter before the round; None: not measured.
        metrics: device -> what it measured; of good updates only, and of this round.
        failed: devices that answered with an error instead of an update.
        asked: devices that the round gave work to.
        rounds: those whose updates are in it.
        planned_seconds: of the slowest device asked, by its plan.
        good: what was joined.
    """

    joined: GlobalAdapter
    held_out_loss: float | None
    metrics: Mapping[str, Mapping[str, float]]
    failed: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    planned_seconds: float = 0.0
    good: Sequence[Contribution] = ()


def train(
    grid: Grid,
    fleet: Fleet,
    rule: Rule,
    adapter: GlobalAdapter,
    plans: Sequence[DevicePlan],
    optimizer: OptimizerSpec,
    terms: RoundTerms,
    round: int,
    open_rounds: OpenRounds,
    *,
    evaluate: bool,
    emit: Emit,
    draw: Draw | None = None,
    flights: Flights | None = None,
    already: TakenUp = NOTHING,
    plan_anew: PlanAnew | None = None,
    live: Live | None = None,
) -> Outcome:
    """Play one round.

    Its good updates stay in `open_rounds` until the caller has saved the outcome.

    A device that fails, or sends anything that does not pass the checks, is refused with its
    reason; the round goes on without it. What comes after the round has closed goes by the policy
    of `terms`. A round of too few good updates is played again with others, and keeps those it has.

    Args:
        plans: of all devices that may take part.
        draw: which of them do; default: all.
        flights: of the run, where rounds before have left some; default: a round on its own.
        already: what came before an interruption, and need not be asked for.
        plan_anew: asked for other plans before the round is played again.
        live: where devices come and go; default: all are always there.

    Raises:
        RoundError: fewer than `terms.minimum_devices` updates were good, however often it was
            played; or the one is missing that the defence compares with.
    """
    started = time.perf_counter()
    flights = Flights() if flights is None else flights
    began = flights.clock.now()
    collected = Collected(round, {each.update.device: each for each in already.good})
    collected.upload_bytes += already.upload_bytes

    def instruction(plan: DevicePlan, packed: bytes) -> bytes:
        return encode_train_instruction(
            TrainInstruction(
                run=terms.run,
                round=round,
                base_digest=terms.base_digest,
                plan=plan,
                optimizer=optimizer,
                seed=terms.seed,
                tensors_digest=tensors_digest(packed),
                evaluate=evaluate,
                scale=terms.scale,
                labels=fleet.labels,
                codec=terms.up,
                error_feedback=terms.error_feedback,
            )
        )

    def send(chosen: Sequence[DevicePlan]) -> int:
        """Give devices their work; the bytes that it takes."""
        sent = prepare(rule, adapter, chosen, terms, round)
        contents = {
            p.device: to_record(TRAIN, instruction(p, sent[p.device].packed), sent[p.device].packed)
            for p in chosen
        }
        ttl_s = {p.device: terms.policy.ttl_s(asking.allowed_s(p)) for p in chosen}
        by_device = {plan.device: plan for plan in chosen}
        flights.send(grid, fleet.nodes, contents, by_device, sent, round, ttl_s)
        return sum(len(each.packed) for each in sent.values())

    profiles = {name: report.profile for name, report in fleet.reports.items()}
    asking = Asking(
        plans, draw or Draw(), flights, collected, terms, send, emit, already.events, live, profiles
    )
    for attempt in range(terms.policy.repeats + 1):
        asking.begin(attempt)
        collect(
            grid, flights, fleet, terms, collected, open_rounds, emit,
            over=asking.over, after_each=asking.refill, tend=asking.tend,
            ends=asking.ends if live is not None else None,
        )  # fmt: skip
        if len(collected.good) >= terms.minimum_devices:
            break
        if attempt == terms.policy.repeats or (not asking.now and flights.over()):
            raise RoundError(
                f"round {round} needs updates of {terms.minimum_devices} devices, got "
                f"{len(collected.good)} good and {collected.refused} refused; see the reasons "
                f"above, then start the same command again to go on from round {round - 1}"
            )
        asking.take_new_plans(plan_anew)
    late = asking.name_late()
    if live is not None:
        live.allowances.learn(collected.took, collected.silent)
    good = defend(collected.in_order, terms.defence, round, emit)
    joined = rule.join(adapter, good)
    own = [each for each in good if each.update.round == round]
    held_out = _mean(own, "held_out_loss", "held_out_units")
    clock = flights.clock
    fields = {
        "round": round,
        "reported": len(good),
        "refused": collected.refused + len(collected.good) - len(good),
        "late": late,
        "folded": len(good) - len(own),
        "held_out_loss": held_out,
        "train_loss": _mean(good, "train_loss", "train_units"),
        "seconds": time.perf_counter() - started,
        "virtual_seconds": clock.now() - began if clock.virtual else None,
        "planned_seconds": asking.planned_seconds,
        "download_bytes": asking.download_bytes,
        "upload_bytes": collected.upload_bytes,
        "dropped_energy": max(joined.dropped_energy.values(), default=0.0),
    }
    emit(Event("round_finished", fields))
    return Outcome(
        joined,
        held_out,
        {each.update.device: each.update.metrics for each in own},
        tuple(sorted(collected.failed)),
        asked=tuple(sorted(asking.all)),
        rounds=tuple(sorted({each.update.round for each in collected.in_order})),
        planned_seconds=asking.planned_seconds,
        good=good,
    )


def _mean(good: Sequence[Contribution], value: str, units: str) -> float | None:
    """Mean of a metric over the devices that measured it, weighted by its units."""
    metrics = [c.update.metrics for c in good]
    return weighted([(m[value], m[units]) for m in metrics if m.get(units, 0) > 0 and value in m])
