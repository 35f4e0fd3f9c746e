"""Simulated devices that train side by side, in one pass over the backbone that they share.

Only a simulation does this: on real machines every device is alone. The answers are those of
`fedtune_client.app`, byte for byte but for the seconds in them; a device whose instruction is
refused fails alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Context, Message

from fedtune.errors import FedtuneError
from fedtune.model.loss import sums_together
from fedtune.settings import RunConfig
from fedtune.train.batches import micro_batches
from fedtune.train.side_by_side import Share, train_side_by_side
from fedtune.wire.flower import TRAIN, from_record, to_record
from fedtune.wire.messages import (
    TrainInstruction,
    decode_train_instruction,
    encode_train_report,
)
from fedtune_client.agent import Agent, Work
from fedtune_client.app import agent_of, with_tensors
from fedtune_client.site import SimulatedFleet, SiteSource

_PASS_TOKENS = 4096
"""Tokens of one pass, unless a single device has more. Measured on stories260k: passes of 1,000 to
4,000 tokens are fastest, and past 8,000 the activations leave the cache."""


@dataclass(frozen=True, slots=True)
class _Accepted:
    """One device whose instruction was accepted, and where its answer goes."""

    place: int
    agent: Agent
    order: TrainInstruction
    work: Work


class SideBySide:
    """Answers instructions to train for several devices of a simulated fleet in one pass.

    Args:
        most: devices in one pass.
    """

    def __init__(self, sites: SiteSource, most: int) -> None:
        self._sites, self.most = sites, most

    def key(self, message: Message) -> Hashable:
        """What two instructions must have in common; None for a message that goes alone."""
        if message.metadata.message_type != TRAIN:
            return None
        try:
            order = decode_train_instruction(from_record(message.content, TRAIN)[0])
        except FedtuneError:
            return None  # alone it gets its own refusal
        plan = order.plan
        forms = tuple((matrix.name, matrix.form) for matrix in plan.matrices)
        cut = (plan.micro_batch, plan.batch_size, plan.local_steps, plan.checkpointing)
        return order.run, order.round, order.labels, order.optimizer, cut, forms

    def __call__(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        """A reply, or why there is none, for each message in turn."""
        answers: dict[int, Message | Exception] = {}
        accepted: list[_Accepted] = []
        for place, (message, context) in enumerate(zip(messages, contexts, strict=True)):
            try:
                body, packed = with_tensors(message.content, TRAIN)
                order = decode_train_instruction(body)
                agent = agent_of(self._sites, context)
                if self._alone(agent, order):
                    report, tensors = agent.train(order, packed)
                    answers[place] = _reply(message, encode_train_report(report), tensors)
                else:
                    accepted.append(_Accepted(place, agent, order, agent.accept(order, packed)))
            except FedtuneError as error:
                answers[place] = error
        for group in _passes(accepted):
            first = group[0]
            results = train_side_by_side(
                first.work.backbone,
                [Share(a.work.batches, a.work.dispatch, a.work.memory) for a in group],
                first.order.plan,
                first.order.optimizer,
                pad_id=first.agent.pad_id,
            )
            for device, result in zip(group, results, strict=True):
                report, tensors = device.agent.report(device.order, result, device.work.metrics)
                message = messages[device.place]
                answers[device.place] = _reply(message, encode_train_report(report), tensors)
        return [answers[place] for place in range(len(messages))]

    def _alone(self, agent: Agent, order: TrainInstruction) -> bool:
        backbone = agent.backbone(order.plan, order.labels)
        with backbone.lock:
            together = order.optimizer.way.shares_a_pass and agent.trains_side_by_side
            return not (together and sums_together(backbone.model))


def make_side_by_side(config: RunConfig) -> SideBySide | None:
    """What lets the devices of a simulated fleet train side by side; None if the run wants none."""
    most = config.simulation.devices_per_pass
    if most == 1:
        return None
    return SideBySide(SimulatedFleet(config.model_dump_json()), most)


def _passes(accepted: Iterable[_Accepted]) -> Iterator[list[_Accepted]]:
    """Devices that go together without their pass growing past `_PASS_TOKENS`."""
    group: list[_Accepted] = []
    tokens = 0
    for device in accepted:
        own = _largest_pass(device)
        if group and tokens + own > _PASS_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(device)
        tokens += own
    if group:
        yield group


def _largest_pass(device: _Accepted) -> int:
    """Tokens of the device's largest micro-batch."""
    size = device.order.plan.micro_batch
    return max(
        sum(len(sample.tokens) for sample in part)
        for batch in device.work.batches
        for part in micro_batches(batch, size)
    )


def _reply(message: Message, body: bytes, tensors: bytes) -> Message:
    return Message(to_record(TRAIN, body, tensors), reply_to=message)
