"""Bytes that nobody wrote: valid ones with something changed, so that they get past first checks.

Each function takes valid bytes and a generator, and gives other bytes. All are deterministic.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

Mutate: TypeAlias = Callable[[bytes, random.Random], bytes]

_EXTREMES = (0, 1, -1, 127, 128, 255, 2**31 - 1, 2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
_ODD_VALUES: Sequence[Any] = (
    None, True, [], {}, "", "\x00", "\x1b[2J", "é" * 600, "../../etc/passwd", -1, 0, 1e308, 1e999,
    float("nan"), 2**70, -(2**70), [[]], {"": {}}, [0] * 300, "inf", "\ud800", 0.5, [2**47] * 2,
)  # fmt: skip


# ---------------------------------------------------------------- any bytes


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    start = rng.randrange(len(changed))
    value = rng.choice(
        (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff\x0f", rng.randbytes(9))
    )
    changed[start : start + len(value)] = value
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 64) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A part comes twice; of a protobuf message, a field."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.randrange(1, 256))
    return data[:end] + data[start:end] * rng.choice((1, 2, 20)) + data[end:]


def insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randrange(1, 32)) + data[start:]


def edit_length(data: bytes, rng: random.Random) -> bytes:
    """An 8-byte little-endian length, at the front where our own layouts have it."""
    at = 0 if rng.random() < 0.7 else rng.randrange(max(1, len(data)))
    value = rng.choice(_EXTREMES) % 2**64
    return data[:at] + value.to_bytes(8, "little") + data[at + 8 :]


def edit_number(data: bytes, rng: random.Random) -> bytes:
    """Digits in a text become other digits."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return insert(data, rng)
    at = rng.choice(places)
    value = rng.choice((*map(str, _EXTREMES), "1e999", "NaN", "-0", "0x10", "1_0", "9" * 5000))
    return data[:at] + value.encode() + data[at + 1 :]


def nothing_of_it(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 64, 1000)))


def nested(data: bytes, rng: random.Random) -> bytes:
    """Deep nesting, which recursive parsers do not survive."""
    depth = rng.choice((200, 2000, 100_000))
    return rng.choice((b"[", b'{"a":', b"a=[")) * depth + data[:20]


ANY: tuple[Mutate, ...] = (
    flip_bits, flip_bits, overwrite, truncate, cut_out, repeat, insert, edit_length, edit_number,
    nothing_of_it,
)  # fmt: skip


# ---------------------------------------------------------------- JSON


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON document becomes another, is removed, or gets a neighbour."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return flip_bits(data, rng)
    return json.dumps(_edited(tree, rng), separators=(",", ":")).encode("utf-8", "surrogatepass")


def _edited(tree: Any, rng: random.Random) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(sorted(tree))
        action = rng.random()
        if action < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        if action < 0.2:
            return {**tree, rng.choice(("", "x", key + "_", "\x07", "a" * 700)): tree[key]}
        return {**tree, key: _edited(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = rng.randrange(len(tree))
        if rng.random() < 0.2:
            return tree[:at] + [tree[at]] * rng.choice((0, 2, 50)) + tree[at + 1 :]
        return [*tree[:at], _edited(tree[at], rng), *tree[at + 1 :]]
    return rng.choice(_ODD_VALUES)


JSON: tuple[Mutate, ...] = (*ANY, *(edit_json,) * 8, nested)


def toml(data: bytes, rng: random.Random) -> bytes:
    """A line of a TOML document is repeated, moved, or gets another value."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    action = rng.random()
    if action < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif b"=" in lines[at]:
        values = (b"[]", b"{}", b'""', b"nan", b"-1", b"1e400", b"true", b"[[1]]", b"2026-01-01",
                  b'"\\u0000"', b"99999999999999999999", b'{a = 1}', b"'x'")  # fmt: skip
        lines[at] = lines[at].split(b"=")[0] + b"= " + rng.choice(values)
    else:
        del lines[at]
    return b"\n".join(lines)


TOML: tuple[Mutate, ...] = (*ANY, *(toml,) * 8, nested)


# ---------------------------------------------------------------- a header in front of values


def edit_packed(data: bytes, rng: random.Random) -> bytes:
    """The deflated JSON header of packed tensors is edited, and its length made to fit."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = zlib.decompress(data[8 : 8 + size])
    except zlib.error:
        return flip_bits(data, rng)
    return _with_header(zlib.compress(edit_json(header, rng), 1), data[8 + size :], rng)


def inflating(data: bytes, rng: random.Random) -> bytes:
    """A few bytes that say that they stand for very many."""
    size = rng.choice((2**20, 2**24, 2**25))
    return _with_header(zlib.compress(b'{"a":"' + b" " * size, 9), data[-64:], rng)


def edit_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The JSON header of a safetensors file is edited, and its length made to fit."""
    size = int.from_bytes(data[:8], "little")
    return _with_header(edit_json(data[8 : 8 + size], rng), data[8 + size :], rng)


def edit_facts(data: bytes, rng: random.Random) -> bytes:
    """The JSON text inside the header of a checkpoint is edited."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        meta = header["__metadata__"]
        key = rng.choice(sorted(meta))
        meta[key] = edit_json(meta[key].encode(), rng).decode("utf-8", "replace")
    except (ValueError, TypeError, LookupError, AttributeError):
        return flip_bits(data, rng)
    return _with_header(json.dumps(header).encode(), data[8 + size :], rng)


def _with_header(header: bytes, values: bytes, rng: random.Random) -> bytes:
    spare = rng.choice((b"", b"", b"", b"\0" * 16))
    return len(header).to_bytes(8, "little") + header + values + spare


PACKED: tuple[Mutate, ...] = (*ANY, *(edit_packed,) * 8)
CHECKPOINT: tuple[Mutate, ...] = (*ANY, *(edit_safetensors,) * 3, *(edit_facts,) * 6)


# ---------------------------------------------------------------- protobuf


def edit_protobuf(kind: type[Message]) -> Mutate:
    """Fields of a message get extreme values, come often, or are missing."""

    def edit(data: bytes, rng: random.Random) -> bytes:
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError:
            return flip_bits(data, rng)
        _edit_fields(message, rng, 0)
        return message.SerializeToString()

    return edit


def _edit_fields(message: Message, rng: random.Random, depth: int) -> None:
    field = rng.choice(message.DESCRIPTOR.fields) if message.DESCRIPTOR.fields else None
    if field is None:
        return
    repeated = hasattr(getattr(message, field.name), "__len__") and field.is_repeated
    if field.message_type and field.message_type.GetOptions().map_entry:
        _edit_map(getattr(message, field.name), field, rng)
    elif field.message_type and repeated:
        items = getattr(message, field.name)
        if items and rng.random() < 0.7:
            _edit_fields(rng.choice(items), rng, depth + 1)
        else:
            for _ in range(rng.choice((1, 2, 50))):
                items.add().CopyFrom(items[0]) if items else items.add()
    elif field.message_type:
        if rng.random() < 0.1 or depth > 4:
            message.ClearField(field.name)
        else:
            _edit_fields(getattr(message, field.name), rng, depth + 1)
    elif repeated:
        values = [_value(field, rng) for _ in range(rng.choice((0, 1, 3, 300)))]
        del getattr(message, field.name)[:]
        getattr(message, field.name).extend(values)
    else:
        setattr(message, field.name, _value(field, rng))


def _edit_map(entries: Any, field: Any, rng: random.Random) -> None:
    value = field.message_type.fields_by_name["value"]
    for _ in range(rng.choice((1, 1, 300))):
        key = rng.choice(("", "x", "\x1b[2J", "k" * 600, f"n{rng.random()}"))
        if value.message_type is None:
            entries[key] = _value(value, rng)


def _value(field: Any, rng: random.Random) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return rng.choice((0.0, -1.0, 1e308, 1e-308, float("nan"), float("inf"), 0.5))
    if kind == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == field.CPPTYPE_STRING:
        texts = ("", "x", "\0", "\x1b[2J", "k" * 600, "../..", "fp32", "\u202e", "a b", "é")
        text = rng.choice(texts)
        return text.encode() if field.type == field.TYPE_BYTES else text
    low, high = {
        field.CPPTYPE_UINT32: (0, 2**32 - 1),
        field.CPPTYPE_UINT64: (0, 2**64 - 1),
        field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    }.get(kind, (0, 1))
    return min(max(rng.choice(_EXTREMES), low), high)


def protobuf(kind: type[Message]) -> tuple[Mutate, ...]:
    return (*ANY, *(edit_protobuf(kind),) * 8)
