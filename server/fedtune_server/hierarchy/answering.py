"""A message of the level above, as bytes, and a group's answer to it."""

from __future__ import annotations

from fedtune.errors import ProtocolError
from fedtune.wire.flower import CALIBRATE, EVALUATE, PROFILE, TRAIN
from fedtune.wire.messages import (
    decode_evaluate_instruction,
    decode_task_spec,
    decode_train_instruction,
    encode_evaluate_report,
    encode_site_report,
    encode_train_report,
)
from fedtune_server.hierarchy.sub_coordinator import SubCoordinator


def answer(
    group: SubCoordinator, kind: str, body: bytes, packed: bytes | None
) -> tuple[bytes, bytes | None]:
    """The answer's body, and the packed tensors beside it.

    Raises:
        ProtocolError: the message is malformed, or a group does not answer it.
        FedtuneError: what the group's own round raised.
    """
    if kind == PROFILE:
        return encode_site_report(group.describe(decode_task_spec(body))), None
    if kind == TRAIN:
        report, tensors = group.train(decode_train_instruction(body), _beside(kind, packed))
        return encode_train_report(report), tensors
    if kind == EVALUATE:
        order = decode_evaluate_instruction(body)
        return encode_evaluate_report(group.evaluate(order, _beside(kind, packed))), None
    if kind == CALIBRATE:
        raise ProtocolError(
            f"a group does not measure ({CALIBRATE}); let devices of the level above do it, or "
            "name a report that a run below has left (importance.file)"
        )
    raise ProtocolError(f"a group does not know messages of kind {kind[:100]!r}")


def _beside(kind: str, packed: bytes | None) -> bytes:
    if packed is None:
        raise ProtocolError(f"message {kind}: expected tensors beside it, found none")
    return packed
