"""One round: send every device its work, check what comes back, join what is good."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune.aggregate.rules import Rule
from fedtune.errors import ProtocolError, RefusedUpdateError, RoundError
from fedtune.records import (
    AdapterUpdate,
    Contribution,
    DevicePlan,
    Dispatch,
    Event,
    GlobalAdapter,
    LoraScale,
    MatrixShape,
    SiteReport,
)
from fedtune.wire.check import check_update
from fedtune.wire.flower import EVALUATE, TRAIN, to_record
from fedtune.wire.messages import (
    EvaluateInstruction,
    OptimizerSpec,
    TrainInstruction,
    decode_evaluate_report,
    decode_train_report,
    encode_evaluate_instruction,
    encode_train_instruction,
)
from fedtune.wire.packing import WireDtype, pack_tensors, tensors_digest
from fedtune.wire.tensors import dispatch_tensors, round_dispatch
from fedtune_server.exchange import Answer, exchange
from fedtune_server.fleet import Emit, Fleet


@dataclass(frozen=True, slots=True)
class RoundTerms:
    """What stays the same in every round of a run.

    Attributes:
        weights: how much a device counts: by the `samples` that its site holds (FedAvg's n_k), by
            the `tokens` that carried loss in its round, or `uniform`.
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


@dataclass(frozen=True, slots=True)
class Sent:
    """One device's packed start of a round, as it is and as it travels."""

    dispatch: Dispatch
    packed: bytes


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
        good: in the order of their devices' names.
        refused: updates that were not good, or did not come.
        failed: as in `Outcome`.
        upload_bytes: of all tensors that came.
    """

    good: Sequence[Contribution]
    refused: int
    failed: tuple[str, ...]
    upload_bytes: int


def prepare(
    rule: Rule, adapter: GlobalAdapter, plans: Sequence[DevicePlan], terms: RoundTerms, round: int
) -> dict[str, Sent]:
    """What each device starts from, rounded to the wire's dtype.

    The generator starts alike for every device, so that fresh directions nest over ranks.
    """
    sent = {}
    for plan in plans:
        rng = np.random.default_rng([terms.seed, round])
        dispatch = rule.dispatch(adapter, plan, scale=terms.scale, rng=rng)
        dispatch = round_dispatch(dispatch, terms.wire_dtype)
        packed = pack_tensors(dispatch_tensors(dispatch), terms.wire_dtype)
        sent[plan.device] = Sent(dispatch, packed)
    return sent


def train(
    grid: Grid,
    fleet: Fleet,
    rule: Rule,
    adapter: GlobalAdapter,
    plans: Sequence[DevicePlan],
    optimizer: OptimizerSpec,
    terms: RoundTerms,
    round: int,
    *,
    evaluate: bool,
    emit: Emit,
) -> Outcome:
    """Play one round.

    A device that fails, is late, or sends anything that does not pass the checks is refused with
    its reason; the round goes on without it.

    Raises:
        RoundError: fewer than `terms.minimum_devices` updates were good.
    """
    started = time.perf_counter()
    emit(Event("round_started", {"round": round, "devices": [plan.device for plan in plans]}))
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

    contents = {p.device: to_record(TRAIN, instruction(p), sent[p.device].packed) for p in plans}
    back = _collect(grid, fleet, contents, plans, sent, terms, round, emit)
    good = back.good
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
        "upload_bytes": back.upload_bytes,
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
        try:
            update = _accept(answer, by_device[answer.device], fleet, terms, round)
        except ProtocolError as error:
            refused += 1
            if answer.failure and not answer.silent:
                failed.append(answer.device)
            fields = {"round": round, "device": answer.device, "reason": str(error)}
            emit(Event("device_refused", fields))
            continue
        start = sent[answer.device]
        weight = _weight(update, fleet.reports[answer.device], terms.weights)
        good.append(Contribution(weight, start.dispatch, update))
        emit(_reported(update, len(start.packed), len(answer.tensors or b"")))
    good.sort(key=lambda contribution: contribution.update.device)
    return _Collected(good, refused, tuple(sorted(failed)), received)


def evaluate(
    grid: Grid,
    fleet: Fleet,
    rule: Rule,
    adapter: GlobalAdapter,
    plans: Sequence[DevicePlan],
    terms: RoundTerms,
    emit: Emit,
) -> float | None:
    """Held-out loss of the adapter over all devices, each on its own backbone and data."""
    sent = prepare(rule, adapter, plans, terms, adapter.round + 1)
    contents = {
        plan.device: to_record(
            EVALUATE,
            encode_evaluate_instruction(
                EvaluateInstruction(
                    run=terms.run,
                    round=adapter.round,
                    base_digest=terms.base_digest,
                    plan=plan,
                    tensors_digest=tensors_digest(sent[plan.device].packed),
                    scale=terms.scale,
                    labels=fleet.labels,
                )
            ),
            sent[plan.device].packed,
        )
        for plan in plans
    }
    measured: dict[str, Mapping[str, float]] = {}
    for answer in exchange(
        grid, contents, fleet.nodes, kind=EVALUATE, group="end", deadline_s=terms.deadline_s
    ):
        try:
            measured[answer.device] = _read_evaluation(answer, terms, adapter.round)
        except ProtocolError as error:
            fields = {"round": adapter.round, "device": answer.device, "reason": str(error)}
            emit(Event("device_refused", fields))
    measured = {
        device: metrics
        for device, metrics in sorted(measured.items())
        if metrics.get("held_out_units", 0) > 0 and "held_out_loss" in metrics
    }
    loss = _weighted([(m["held_out_loss"], m["held_out_units"]) for m in measured.values()])
    hits = [(m["accuracy"], m["held_out_units"]) for m in measured.values() if "accuracy" in m]
    emit(
        Event(
            "evaluated",
            {
                "round": adapter.round,
                "held_out_loss": loss,
                "accuracy": _weighted(hits),
                "devices": {device: m["held_out_loss"] for device, m in measured.items()},
            },
        )
    )
    return loss


def _accept(
    answer: Answer, plan: DevicePlan, fleet: Fleet, terms: RoundTerms, round: int
) -> AdapterUpdate:
    if answer.failure:
        raise RefusedUpdateError(answer.failure)
    if answer.tensors is None:
        raise RefusedUpdateError("the report came without tensors")
    return check_update(
        decode_train_report(answer.body),
        answer.tensors,
        run=terms.run,
        round=round,
        device=answer.device,
        base_digest=terms.base_digest,
        plan=plan,
        shapes=terms.shapes,
        dense_shapes=fleet.dense_shapes,
        max_norm=terms.max_norm,
        scale=terms.scale,
    )


def _read_evaluation(answer: Answer, terms: RoundTerms, round: int) -> Mapping[str, float]:
    if answer.failure:
        raise ProtocolError(answer.failure)
    report = decode_evaluate_report(answer.body)
    if (report.run, report.round, report.device) != (terms.run, round, answer.device):
        raise ProtocolError(f"expected an evaluation of round {round} by {answer.device}")
    return report.metrics


def _weight(update: AdapterUpdate, report: SiteReport, by: str) -> float:
    weights = {"samples": report.train_samples, "tokens": update.tokens, "uniform": 1}
    return float(weights[by])


def _reported(update: AdapterUpdate, download_bytes: int, upload_bytes: int) -> Event:
    metrics = update.metrics
    return Event(
        "device_reported",
        {
            "round": update.round,
            "device": update.device,
            "loss_before": metrics.get("held_out_loss"),
            "train_loss": metrics.get("train_loss"),
            "samples": update.samples,
            "tokens": update.tokens,
            "download_bytes": download_bytes,
            "upload_bytes": upload_bytes,
            "seconds": metrics.get("seconds"),
            "step_seconds": metrics.get("step_seconds"),
            "peak_bytes": metrics.get("peak_bytes"),
            "free_bytes": metrics.get("free_bytes"),
        },
    )


def _mean(good: Sequence[Contribution], value: str, units: str) -> float | None:
    """Mean of a metric over the devices that measured it, weighted by its units."""
    metrics = [c.update.metrics for c in good]
    return _weighted([(m[value], m[units]) for m in metrics if m.get(units, 0) > 0 and value in m])


def _weighted(pairs: Sequence[tuple[float, float]]) -> float | None:
    total = sum(units for _, units in pairs)
    return sum(value * units for value, units in pairs) / total if total > 0 else None
