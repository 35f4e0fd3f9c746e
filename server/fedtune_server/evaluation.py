"""The held-out loss of the joined adapter, measured by every device on its own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.serverapp import Grid

from fedtune.aggregate.rules import Rule
from fedtune.errors import ProtocolError
from fedtune.records import DevicePlan, Event, GlobalAdapter
from fedtune.wire.flower import EVALUATE, to_record
from fedtune.wire.messages import (
    EvaluateInstruction,
    decode_evaluate_report,
    encode_evaluate_instruction,
)
from fedtune.wire.packing import tensors_digest
from fedtune_server.exchange import Answer
from fedtune_server.fleet import Emit, Fleet
from fedtune_server.presence import Again
from fedtune_server.questions import ask
from fedtune_server.starts import prepare
from fedtune_server.terms import RoundTerms


def evaluate(
    grid: Grid,
    fleet: Fleet,
    rule: Rule,
    adapter: GlobalAdapter,
    plans: Sequence[DevicePlan],
    terms: RoundTerms,
    emit: Emit,
    again: Again | None = None,
) -> float | None:
    """Held-out loss of the adapter over all devices, each on its own backbone and data."""
    measured = measure(grid, fleet, rule, adapter, plans, terms, emit, again)
    loss = weighted([(m["held_out_loss"], m["held_out_units"]) for m in measured.values()])
    hits = [(m["accuracy"], m["held_out_units"]) for m in measured.values() if "accuracy" in m]
    emit(
        Event(
            "evaluated",
            {
                "round": adapter.round,
                "held_out_loss": loss,
                "accuracy": weighted(hits),
                "devices": {device: m["held_out_loss"] for device, m in measured.items()},
            },
        )
    )
    return loss


def measure(
    grid: Grid,
    fleet: Fleet,
    rule: Rule,
    adapter: GlobalAdapter,
    plans: Sequence[DevicePlan],
    terms: RoundTerms,
    emit: Emit,
    again: Again | None = None,
) -> dict[str, Mapping[str, float]]:
    """What each device measures of the adapter, of those that hold samples for it.

    Args:
        again: how devices that come and go are asked again; default: they stay.
    """
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
    for answer in ask(
        grid, contents, fleet.nodes, kind=EVALUATE, group="end", deadline_s=terms.deadline_s,
        again=again,
    ):  # fmt: skip
        try:
            measured[answer.device] = _read_evaluation(answer, terms, adapter.round)
        except ProtocolError as error:
            fields = {"round": adapter.round, "device": answer.device, "reason": str(error)}
            emit(Event("device_refused", fields))
    return {
        device: metrics
        for device, metrics in sorted(measured.items())
        if metrics.get("held_out_units", 0) > 0 and "held_out_loss" in metrics
    }


def _read_evaluation(answer: Answer, terms: RoundTerms, round: int) -> Mapping[str, float]:
    if answer.failure:
        raise ProtocolError(answer.failure)
    report = decode_evaluate_report(answer.body)
    if (report.run, report.round, report.device) != (terms.run, round, answer.device):
        raise ProtocolError(f"expected an evaluation of round {round} by {answer.device}")
    return report.metrics


def weighted(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Mean of (value, units) pairs by their units; None without units."""
    total = sum(units for _, units in pairs)
    return sum(value * units for value, units in pairs) / total if total > 0 else None
