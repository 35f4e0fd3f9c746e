"""An answer of a device becomes a contribution, or is refused with words."""

from __future__ import annotations

from fedtune.errors import ProtocolError, RefusedUpdateError
from fedtune.records import AdapterUpdate, Contribution, DevicePlan, Event, SiteReport
from fedtune.wire.check import check_update
from fedtune.wire.messages import decode_train_report
from fedtune_server.exchange import Answer
from fedtune_server.fleet import Fleet
from fedtune_server.open_round import Kept, OpenRounds
from fedtune_server.starts import Sent
from fedtune_server.terms import RoundTerms


def accept(
    answer: Answer,
    plan: DevicePlan,
    sent: Sent,
    fleet: Fleet,
    terms: RoundTerms,
    round: int,
    open_rounds: OpenRounds,
) -> Contribution:
    """Check an answer to an instruction of a round; what it adds to the join.

    A good one stays in `open_rounds`, from where the join reads its tensors.

    Raises:
        ProtocolError: anything is not as it was asked for; the message says what.
    """
    if answer.failure:
        raise RefusedUpdateError(answer.failure)
    if answer.tensors is None:
        raise RefusedUpdateError("the report came without tensors")
    kept = open_rounds.keep(round, answer.device, answer.body, answer.tensors)
    try:
        return accept_kept(kept, answer.device, plan, sent, fleet, terms, round)
    except ProtocolError:
        open_rounds.drop(round, answer.device)
        raise


def accept_kept(
    kept: Kept,
    device: str,
    plan: DevicePlan,
    sent: Sent,
    fleet: Fleet,
    terms: RoundTerms,
    round: int,
) -> Contribution:
    """Check an answer that lies on the disk; what it adds to the join.

    Raises:
        ProtocolError: as for `accept`.
    """
    report = fleet.reports[device]
    update = check_update(
        decode_train_report(kept.body),
        kept.tensors,
        run=terms.run,
        round=round,
        device=device,
        base_digest=terms.base_digest,
        plan=plan,
        shapes=terms.shapes,
        dense_shapes=fleet.dense_shapes,
        max_norm=terms.max_norm,
        scale=terms.scale,
        codec=terms.up,
        sent=sent.dispatch,
        devices=report.devices,
        held_samples=report.train_samples,
    )
    weight = _weight(update, report, terms.weights)
    return Contribution(weight, sent.dispatch, update)


def _weight(update: AdapterUpdate, report: SiteReport, by: str) -> float:
    """What an update counts; one of several devices counts as they would together."""
    weights = {
        "samples": update.held_samples or report.train_samples,
        "tokens": update.tokens,
        "uniform": update.devices,
    }
    return float(weights[by])


def reported(
    update: AdapterUpdate,
    download_bytes: int,
    upload_bytes: int,
    round: int | None = None,
    staleness: int = 0,
) -> Event:
    """Tells of an update that was good.

    Args:
        round: in which it counts; default: the one that it answers.
        staleness: rounds that it came late.
    """
    metrics = update.metrics
    return Event(
        "device_reported",
        {
            "round": update.round if round is None else round,
            "device": update.device,
            "staleness": staleness,
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
