"""Messages inside Flower records: the only module of the core that knows Flower.

A message is one ConfigRecord (`version`, `kind`, `body`: protobuf bytes) and, when tensors travel
with it, one ArrayRecord of ONE Array. Flower sends every array on its own, with two HTTP posts and
a database transaction each, so an adapter of 400 tensors packed in one block takes seconds where
400 arrays take minutes. The array's `stype` is our own: Flower carries such bytes untouched.

Packed tensors that fit one post travel in a ConfigRecord of their own instead: four posts of six,
on each of the four legs between coordinator, link and device. They stay a record of their own
because Flower sends a record once to its link, however many messages hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.errors import ProtocolError
from fedtune.wire.fields import MAX_MESSAGE_BYTES, shown

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

VERSION = 1
TENSORS_STYPE = "fedtune.safetensors.v1"

PROFILE = "query.profile"
CALIBRATE = "query.calibration"
TRAIN = "train.lora"
EVALUATE = "evaluate.loss"
"""Flower message types; also the `kind` of the record that travels."""

_CONFIG, _TENSORS, _PACKED = "fedtune", "tensors", "packed"

SMALL_BYTES = 4 << 20
"""Tensors up to this size travel in a ConfigRecord, which Flower posts whole. It cuts arrays into
pieces of 5 MB, so no post becomes larger by it."""


def to_record(kind: str, body: bytes, tensors: bytes | None = None) -> RecordDict:
    """Put a message into the records that Flower sends.

    Args:
        kind: what the body is, such as `train.lora`.
        body: protobuf bytes.
        tensors: what `pack_tensors` wrote; default: none travel.
    """
    config = ConfigRecord({"version": VERSION, "kind": kind, "body": body})
    if tensors is None:
        return RecordDict({_CONFIG: config})
    if len(tensors) <= SMALL_BYTES:
        return RecordDict({_CONFIG: config, _TENSORS: ConfigRecord({_PACKED: tensors})})
    array = Array("uint8", (len(tensors),), TENSORS_STYPE, tensors)
    return RecordDict({_CONFIG: config, _TENSORS: ArrayRecord({_PACKED: array})})


def from_record(record: RecordDict, kind: str) -> tuple[bytes, bytes | None]:
    """Take a message out of the records that Flower delivered: its body, and its packed tensors.

    Raises:
        ProtocolError: the records are not a message of this version and kind.
    """
    extra = sorted(set(record) - {_CONFIG, _TENSORS})
    if extra:
        raise ProtocolError(f"message {kind}: unexpected record {shown(str(extra[0]))}")
    body = _body(record.get(_CONFIG), kind)
    if _TENSORS not in record:
        return body, None
    tensors = record[_TENSORS]
    if isinstance(tensors, ConfigRecord):
        return body, _small(tensors, kind)
    return body, _packed(tensors, kind)


def make_forwarding_app(answered: Callable[[str, Message, Context], Message]) -> ClientApp:
    """Build a ClientApp that hands each of the four kinds of messages to one function.

    Args:
        answered: the reply to a message of that kind.
    """
    from flwr.clientapp import ClientApp  # here: a coordinator does without

    app = ClientApp()
    for register, kind in (
        (app.query, PROFILE),
        (app.query, CALIBRATE),
        (app.train, TRAIN),
        (app.evaluate, EVALUATE),
    ):
        register(kind.partition(".")[2])(partial(answered, kind))
    return app


def _body(config: object, kind: str) -> bytes:
    if not isinstance(config, ConfigRecord):
        raise ProtocolError(f"message {kind}: the config record {_CONFIG!r} is missing")
    if set(config) != {"version", "kind", "body"}:
        keys = ", ".join(shown(str(key)) for key in sorted(config)[:8])
        raise ProtocolError(f"message {kind}: expected version, kind and body, got {keys}")
    version, found, body = config["version"], config["kind"], config["body"]
    if version != VERSION or type(version) is not int:
        raise ProtocolError(
            f"message {kind}: expected version {VERSION}, got {shown(str(version))}; "
            "install the same fedtune on coordinator and devices"
        )
    if found != kind:
        raise ProtocolError(f"message: expected kind {kind}, got {shown(str(found))}")
    if not isinstance(body, bytes):
        raise ProtocolError(f"message {kind}: expected bytes as body, got {type(body).__name__}")
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"message {kind}: expected a body of at most {MAX_MESSAGE_BYTES} bytes, got {len(body)}"
        )
    return body


def _small(config: ConfigRecord, kind: str) -> bytes:
    packed = config.get(_PACKED)
    if set(config) != {_PACKED} or not isinstance(packed, bytes):
        raise ProtocolError(f"message {kind}: expected packed tensors, as bytes, and nothing else")
    if len(packed) > SMALL_BYTES:
        raise ProtocolError(
            f"message {kind}: expected at most {SMALL_BYTES} bytes of tensors without an array, "
            f"got {len(packed)}"
        )
    return packed


def _packed(arrays: object, kind: str) -> bytes:
    if not isinstance(arrays, ArrayRecord) or set(arrays) != {_PACKED}:
        raise ProtocolError(f"message {kind}: expected one array of packed tensors")
    array = arrays[_PACKED]
    if array.stype != TENSORS_STYPE:
        raise ProtocolError(
            f"message {kind}: expected array form {TENSORS_STYPE}, got {shown(array.stype)}"
        )
    if array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise ProtocolError(
            f"message {kind}: expected uint8 array of shape ({len(array.data)},), "
            f"got {shown(array.dtype)} {tuple(array.shape)[:8]}"
        )
    return bytes(array.data)
