"""One round: send every device its work, check what comes back, join what is good."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune.aggregate.rules import Rule
from fedtune.errors import ProtocolError, RoundError
from fedtune.records import Contribution, DevicePlan, Event, GlobalAdapter
from fedtune.wire.flower import TRAIN, to_record
from fedtune.wire.messages import OptimizerSpec, TrainInstruction, encode_train_instruction
from fedtune.wire.packing import tensors_digest
from fedtune_server.acceptance import accept, reported
from fedtune_server.evaluation import weighted
from fedtune_server.exchange import exchange
from fedtune_server.fleet import Emit, Fleet
from fedtune_server.open_round import OpenRounds
from fedtune_server.starts import Sent, prepare
from fedtune_server.taken_up import NOTHING, TakenUp
from fedtune_server.terms import RoundTerms


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to.

    Attributes:
        joined: the adapter with all good updates in it.
        held_out_loss: of the adapter before the round; None: not measured.
        metrics: device -> what it measured; of good updates only.
        failed: devices that answered with an error instead of an update.
    """

    joined: GlobalAdapter
    held_out_loss: float | None
    metrics: Mapping[str, Mapping[str, float]]
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Collected:
    """What came back in a round.

    Attributes:
        good: in the order in which they came.
        refused: updates that were not good, or did not come.
        failed: as in `Outcome`.
        upload_bytes: of all tensors that came.
    """

    good: Sequence[Contribution]
    refused: int
    failed: tuple[str, ...]
    upload_bytes: int


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
    already: TakenUp = NOTHING,
) -> Outcome:
    """Play one round.

    Its good updates stay in `open_rounds` until the caller has saved the outcome.

    A device that fails, is late, or sends anything that does not pass the checks is refused with
    its reason; the round goes on without it.

    Args:
        already: what came before an interruption, and need not be asked for.

    Raises:
        RoundError: fewer than `terms.minimum_devices` updates were good.
    """
    started = time.perf_counter()
    emit(Event("round_started", {"round": round, "devices": [plan.device for plan in plans]}))
    for event in already.events:
        emit(event)
    sent = prepare(rule, adapter, plans, terms, round)

    def instruction(plan: DevicePlan) -> bytes:
        return encode_train_instruction(
            TrainInstruction(
                run=terms.run,
                round=round,
                base_digest=terms.base_digest,
                plan=plan,
                optimizer=optimizer,
                seed=terms.seed,
                tensors_digest=tensors_digest(sent[plan.device].packed),
                evaluate=evaluate,
                scale=terms.scale,
                labels=fleet.labels,
                wire_dtype=terms.wire_dtype,
            )
        )

    there = {each.update.device for each in already.good}
    contents = {
        p.device: to_record(TRAIN, instruction(p), sent[p.device].packed)
        for p in plans
        if p.device not in there
    }
    back = _collect(grid, fleet, contents, plans, sent, terms, round, open_rounds, emit)
    good = sorted([*already.good, *back.good], key=lambda contribution: contribution.update.device)
    if len(good) < terms.minimum_devices:
        raise RoundError(
            f"round {round} needs updates of {terms.minimum_devices} devices, got {len(good)} "
            f"good and {back.refused} refused; see the reasons above"
        )
    joined = rule.join(adapter, good)
    held_out = _mean(good, "held_out_loss", "held_out_units")
    fields = {
        "round": round,
        "reported": len(good),
        "refused": back.refused,
        "held_out_loss": held_out,
        "train_loss": _mean(good, "train_loss", "train_units"),
        "seconds": time.perf_counter() - started,
        "planned_seconds": max(plan.seconds for plan in plans),
        "download_bytes": sum(len(s.packed) for s in sent.values()),
        "upload_bytes": already.upload_bytes + back.upload_bytes,
        "dropped_energy": max(joined.dropped_energy.values(), default=0.0),
    }
    emit(Event("round_finished", fields))
    metrics = {each.update.device: each.update.metrics for each in good}
    return Outcome(joined, held_out, metrics, back.failed)


def _collect(
    grid: Grid,
    fleet: Fleet,
    contents: Mapping[str, RecordDict],
    plans: Sequence[DevicePlan],
    sent: Mapping[str, Sent],
    terms: RoundTerms,
    round: int,
    open_rounds: OpenRounds,
    emit: Emit,
) -> _Collected:
    """Check what comes back, and tell of each answer."""
    by_device = {plan.device: plan for plan in plans}
    good: list[Contribution] = []
    failed: list[str] = []
    refused = received = 0
    for answer in exchange(
        grid, contents, fleet.nodes, kind=TRAIN, group=str(round), deadline_s=terms.deadline_s
    ):
        received += len(answer.tensors or b"")
        start = sent[answer.device]
        try:
            plan = by_device[answer.device]
            each = accept(answer, plan, start, fleet, terms, round, open_rounds)
        except ProtocolError as error:
            refused += 1
            if answer.failure and not answer.silent:
                failed.append(answer.device)
            fields = {"round": round, "device": answer.device, "reason": str(error)}
            emit(Event("device_refused", fields))
            continue
        good.append(each)
        emit(reported(each.update, len(start.packed), len(answer.tensors or b"")))
    return _Collected(good, refused, tuple(sorted(failed)), received)


def _mean(good: Sequence[Contribution], value: str, units: str) -> float | None:
    """Mean of a metric over the devices that measured it, weighted by its units."""
    metrics = [c.update.metrics for c in good]
    return weighted([(m[value], m[units]) for m in metrics if m.get(units, 0) > 0 and value in m])
