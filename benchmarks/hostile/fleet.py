"""A simulated fleet in which some devices tamper with what they send back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Context, Message

from fedtune.records import MatrixShape
from fedtune.wire.flower import TRAIN, from_record, to_record
from fedtune.wire.messages import (
    decode_train_instruction,
    decode_train_report,
    encode_train_report,
)
from fedtune.wire.packing import pack_tensors, tensors_digest, unpack_tensors
from fedtune.wire.tensors import (
    unpack_dispatch,
    update_from_tensors,
    update_shapes,
    update_tensors,
)
from hostile.attacks import Gang, spoil, tamper


class Hostile:
    """Changes the replies of some devices, before they leave.

    Args:
        attack: one of `hostile.attacks.ATTACKS`.
        partitions: which devices are hostile.
        shapes: of the base's matrices.
    """

    def __init__(
        self, attack: str, partitions: Sequence[int], shapes: Mapping[str, MatrixShape]
    ) -> None:
        self._attack, self._partitions, self._shapes = attack, set(partitions), shapes
        self._gang = Gang()

    def __call__(self, message: Message, context: Context, reply: Message) -> Message:
        """The reply that leaves the device."""
        partition = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        if message.metadata.message_type != TRAIN or partition not in self._partitions:
            return reply
        body, packed = from_record(message.content, TRAIN)
        order = decode_train_instruction(body)
        sent = unpack_dispatch(packed or b"", order.plan, self._shapes, {}, order.scale)
        said, tensors = from_record(reply.content, TRAIN)
        expected = update_shapes(order.plan, self._shapes, {})
        trained, _ = update_from_tensors(
            unpack_tensors(tensors or b"", expected), order.plan, order.scale
        )
        rng = np.random.default_rng([order.seed, order.round, partition])
        factors = tamper(self._attack, self._gang, order.round, sent, trained, rng)
        bad = spoil(self._attack, pack_tensors(update_tensors(factors, {}), order.codec))
        report = replace(decode_train_report(said), tensors_digest=tensors_digest(bad))
        return Message(to_record(TRAIN, encode_train_report(report), bad), reply_to=message)


class TamperedApp:
    """A ClientApp whose hostile devices change their replies."""

    def __init__(self, app: Any, hostile: Hostile) -> None:
        self._app, self._hostile = app, hostile

    def __call__(self, message: Message, context: Context) -> Message:
        return self._hostile(message, context, self._app(message, context))


class TamperedPass:
    """The same for devices that train side by side."""

    def __init__(self, together: Any, hostile: Hostile) -> None:
        self._together, self._hostile = together, hostile
        self.most: int = together.most

    def key(self, message: Message) -> Hashable:
        found: Hashable = self._together.key(message)
        return found

    def __call__(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message | Exception]:
        replies = self._together(messages, contexts)
        return [
            reply if isinstance(reply, Exception) else self._hostile(message, context, reply)
            for message, context, reply in zip(messages, contexts, replies, strict=True)
        ]
