"""Simulated devices that work side by side, in one pass over the backbone that they share.

Only a simulation does this: on real machines every device is alone. The answers are those of
`fedtune_client.app`, byte for byte but for the seconds in them; a device whose instruction is
refused, or that fails, fails alone.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flwr.app import Context, Message

from fedtune.errors import FedtuneError
from fedtune.evaluate.side_by_side import held_out_losses
from fedtune.model.loss import sums_together
from fedtune.settings import RunConfig
from fedtune.train.batches import micro_batches
from fedtune.train.round import device_factors
from fedtune.train.side_by_side import Share, train_side_by_side
from fedtune.wire.flower import EVALUATE, TRAIN, from_record, to_record
from fedtune.wire.messages import (
    EvaluateInstruction,
    EvaluateReport,
    TrainInstruction,
    decode_evaluate_instruction,
    decode_train_instruction,
    encode_evaluate_report,
    encode_train_report,
)
from fedtune_client.agent import EVALUATION_BATCH, Agent, Measuring, Work, held_out_metrics
from fedtune_client.answering import with_tensors
from fedtune_client.app import agent_of
from fedtune_client.site import SimulatedFleet, SiteSource

_PASS_TOKENS = 4096
"""Tokens of one pass, unless a single device has more. Measured on stories260k: passes of 1,000 to
4,000 tokens are fastest, and past 8,000 the activations leave the cache."""

_Answer: TypeAlias = tuple[str, bytes, bytes | None]
"""Kind, body and tensors of a reply."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Training:
    """One device whose instruction to train was accepted."""

    agent: Agent
    order: TrainInstruction
    work: Work

    def alone(self) -> _Answer:
        report, tensors = self.agent.perform(self.order, self.work)
        return TRAIN, encode_train_report(report), tensors


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One device whose instruction to evaluate was accepted."""

    agent: Agent
    order: EvaluateInstruction
    work: Measuring

    def alone(self) -> _Answer:
        return self.answer(self.agent.measure(self.work))

    def answer(self, metrics: Mapping[str, float]) -> _Answer:
        order = self.order
        report = EvaluateReport(order.run, order.round, self.agent.name, metrics)
        return EVALUATE, encode_evaluate_report(report), None


class SideBySide:
    """Answers what several devices of a simulated fleet are asked alike, in one pass.

    Args:
        most: devices in one pass.
    """

    def __init__(self, sites: SiteSource, most: int) -> None:
        self._sites, self.most = sites, most

    def key(self, message: Message) -> Hashable:
        """What two instructions must have in common; None for a message that goes alone."""
        kind = message.metadata.message_type
        if kind not in (TRAIN, EVALUATE):
            return None
        try:
            body = from_record(message.content, kind)[0]
            order = _decoded(kind, body)
        except FedtuneError:
            return None  # alone it gets its own refusal
        plan = order.plan
        forms = tuple((matrix.name, matrix.form) for matrix in plan.matrices)
        common = (kind, order.run, order.round, order.labels, forms)
        if isinstance(order, EvaluateInstruction):
            return common
        cut = (plan.micro_batch, plan.batch_size, plan.local_steps, plan.checkpointing)
        return *common, order.optimizer, cut

    def __call__(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        """A reply, or why there is none, for each message in turn."""
        answers: dict[int, _Answer | Exception] = {}
        accepted: dict[int, _Training | _Evaluation] = {}
        for place, (message, context) in enumerate(zip(messages, contexts, strict=True)):
            try:
                device = self._accept(message, context)
            except Exception as error:  # noqa: BLE001  # the edge of a device: it fails alone
                answers[place] = error
                continue
            if _goes_together(device):
                accepted[place] = device
            else:
                answers[place] = _alone(device)
        for places in _passes(accepted):
            group = [accepted[place] for place in places]
            answers.update(zip(places, _answers(group), strict=True))
        return [
            found if isinstance(found, Exception) else _reply(message, *found)
            for message, (_, found) in zip(messages, sorted(answers.items()), strict=True)
        ]

    def _accept(self, message: Message, context: Context) -> _Training | _Evaluation:
        kind = message.metadata.message_type
        body, packed = with_tensors(message.content, kind)
        agent, order = agent_of(self._sites, context), _decoded(kind, body)
        if isinstance(order, EvaluateInstruction):
            return _Evaluation(agent, order, agent.accept_evaluation(order, packed))
        return _Training(agent, order, agent.accept(order, packed))


def make_side_by_side(config: RunConfig) -> SideBySide | None:
    """What lets the devices of a simulated fleet work side by side; None if the run wants none.

    Devices whose time is measured work one by one: a shared pass has no seconds of one device.
    """
    most = config.simulation.devices_per_pass
    if most == 1 or config.simulation.clock == "measured":
        return None
    return SideBySide(SimulatedFleet(config.model_dump_json()), most)


def _decoded(kind: str, body: bytes) -> TrainInstruction | EvaluateInstruction:
    return decode_train_instruction(body) if kind == TRAIN else decode_evaluate_instruction(body)


def _goes_together(device: _Training | _Evaluation) -> bool:
    if isinstance(device, _Training) and not device.order.optimizer.way.shares_a_pass:
        return False
    backbone = device.work.backbone
    with backbone.lock:
        return device.agent.trains_side_by_side and sums_together(backbone.model)


def _alone(device: _Training | _Evaluation) -> _Answer | Exception:
    try:
        return device.alone()
    except Exception as error:  # noqa: BLE001  # the edge of a device: it fails alone
        return error


# ---------------------------------------------------------------- several at once


def _passes(accepted: Mapping[int, _Training | _Evaluation]) -> Iterator[list[int]]:
    """Places of devices that go together without their pass growing past `_PASS_TOKENS`."""
    group: list[int] = []
    tokens = 0
    for place, device in accepted.items():
        own = _largest_pass(device)
        if group and tokens + own > _PASS_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(place)
        tokens += own
    if group:
        yield group


def _largest_pass(device: _Training | _Evaluation) -> int:
    """Tokens of the device's largest micro-batch; a measurement is cut where it is made."""
    if isinstance(device, _Evaluation):
        return 0
    size = device.order.plan.micro_batch
    return max(
        sum(len(sample.tokens) for sample in part)
        for batch in device.work.batches
        for part in micro_batches(batch, size)
    )


def _answers(group: Sequence[_Training | _Evaluation]) -> Sequence[_Answer | Exception]:
    """What each device of a group answers; one by one if they cannot do it together."""
    try:
        trained = [device for device in group if isinstance(device, _Training)]
        return _train(trained) if trained else _evaluate(group)
    except Exception:  # noqa: BLE001  # logged in full; whoever is at fault raises it again
        # One of them is at fault, and alone it fails without the others. Nothing is lost: a device
        # keeps what it has learnt only at the end of its round.
        _log.exception("%d devices failed side by side, and go one by one", len(group))
        return [_alone(device) for device in group]


def _train(group: Sequence[_Training]) -> list[_Answer]:
    first = group[0]
    measured = _measure(group)
    results = train_side_by_side(
        first.work.backbone,
        [Share(d.work.batches, d.work.dispatch, d.work.memory) for d in group],
        first.order.plan,
        first.order.optimizer,
        pad_id=first.agent.pad_id,
    )
    answers: list[_Answer] = []
    for device, result, metrics in zip(group, results, measured, strict=True):
        report, tensors = device.agent.report(device.order, device.work.dispatch, result, metrics)
        answers.append((TRAIN, encode_train_report(report), tensors))
    return answers


def _evaluate(group: Sequence[_Training | _Evaluation]) -> list[_Answer]:
    every = [device for device in group if isinstance(device, _Evaluation)]
    return [device.answer(metrics) for device, metrics in zip(every, _measure(every), strict=True)]


def _measure(group: Sequence[_Training | _Evaluation]) -> list[dict[str, float]]:
    """The held-out metrics of each device; none of those without samples."""
    backbone, pad_id = group[0].work.backbone, group[0].agent.pad_id
    measured = [device for device in group if device.work.held_out]
    if not measured:
        return [{} for _ in group]
    with backbone.lock:
        found = held_out_losses(
            backbone,
            [device_factors(backbone, d.work.dispatch, trainable=False) for d in measured],
            [device.work.held_out for device in measured],
            EVALUATION_BATCH,
            pad_id,
            _PASS_TOKENS,
        )
    reports = iter(found)
    return [held_out_metrics(next(reports)) if d.work.held_out else {} for d in group]


def _reply(message: Message, kind: str, body: bytes, tensors: bytes | None) -> Message:
    return Message(to_record(kind, body, tensors), reply_to=message)
