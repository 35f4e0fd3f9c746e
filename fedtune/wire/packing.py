"""Tensors as they travel: one block of bytes with a short header, little-endian.

The layout is 8 bytes of header length, a deflated JSON header (name -> codec, shape and, where
directions have bits of their own, a digit for each), and the values of the tensors in the order of
the header, without gaps. Names repeat themselves so much that
a tensor takes about 7 bytes of header, where the safetensors layout takes 100: more than the values
of a small adapter in 3 bits.

Bytes from a device are hostile, and the refusal has to say which tensor is wrong: the header is
bounded before it is inflated and parsed, names and shapes must be exactly those expected, the bytes
must be as many as the codecs say, and every value must be finite.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fedtune.coding import ALLOTTED_CODECS, CODECS, MOST_BITS, CodecName, blocks_of, coded_bytes
from fedtune.errors import ProtocolError
from fedtune.records import FloatArray
from fedtune.wire.codecs import Packed, decode, encode
from fedtune.wire.fields import shown, unique

__all__ = [
    "Packed",
    "PackedTensors",
    "Shape",
    "pack_tensors",
    "packed_shapes",
    "tensors_digest",
    "unpack_tensors",
]

Shape = tuple[int, ...]

MAX_HEADER_BYTES = 16 * 2**20
"""Inflated: about 200,000 tensors, twice what a plan of the largest allowed size sends."""

_LENGTH_BYTES = 8
_DIGITS = frozenset("012345678")
_NONE: Mapping[str, Sequence[int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Entry:
    codec: CodecName
    shape: Shape
    begin: int
    bits: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        return self.begin + coded_bytes(self.codec, self.shape, self.bits)


def pack_tensors(
    tensors: Mapping[str, FloatArray],
    codec: CodecName = "fp32",
    bits: Mapping[str, Sequence[int]] = _NONE,
) -> bytes:
    """Write tensors as one block; equal tensors give equal bytes, in whatever order they come.

    Args:
        bits: of each direction, by tensor; those of others are the codec's.

    Raises:
        ProtocolError: a value is not finite, or does not fit the codec.
    """
    names = sorted(tensors)
    tree: dict[str, list[object]] = {}
    for name in names:
        own = ["".join(map(str, bits[name]))] if name in bits else []
        tree[name] = [codec, list(tensors[name].shape), *own]
    header = zlib.compress(json.dumps(tree, separators=(",", ":")).encode("utf-8"), 9)
    values = [encode(tensors[name], codec, name, bits.get(name)) for name in names]
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *values])


class PackedTensors(Mapping[str, NDArray[np.float32]]):
    """A block whose names and shapes are checked, and whose values are read when asked for.

    A tensor comes out as a float32 array of its own memory, anew at each request.

    Args:
        data: what `pack_tensors` wrote, or what a hostile device says it did.
        expected: name -> shape of every tensor that must be in it, and of none besides.
        max_bytes: refuse a longer block unread; default: what the expected tensors take at most.
        codec: that every tensor must have; None: each may have any.

    Raises:
        ProtocolError: anything is off; the message names the tensor, what was expected and found.
            A value that is not finite is found when its tensor is read.
    """

    def __init__(
        self,
        data: Packed,
        expected: Mapping[str, Shape],
        max_bytes: int | None = None,
        codec: CodecName | None = None,
    ) -> None:
        most = _most_bytes(expected, codec or "fp32") if max_bytes is None else max_bytes
        if len(data) > most:
            raise ProtocolError(f"packed tensors: expected at most {most} bytes, got {len(data)}")
        self._data, self._names = data, tuple(expected)
        self._entries = _read_header(data)
        _compare_names(self._entries, expected)
        for name, shape in expected.items():
            found = self._entries[name].shape
            if found != tuple(shape):
                raise ProtocolError(
                    f"tensor {name}: expected shape {tuple(shape)}, got {found[:8]}"
                )
            form = self._entries[name].codec
            if codec is not None and form != codec:
                raise ProtocolError(f"tensor {name}: expected codec {codec}, got {form}")

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self._entries[name]
        return decode(self._data, entry.begin, entry.codec, entry.shape, name, entry.bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def unpack_tensors(
    data: Packed,
    expected: Mapping[str, Shape],
    max_bytes: int | None = None,
    codec: CodecName | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Read a whole block, as `PackedTensors` does, into memory."""
    return dict(PackedTensors(data, expected, max_bytes, codec))


def packed_shapes(data: Packed) -> dict[str, Shape]:
    """Name -> shape of every tensor in a block, of which only the header is read.

    Raises:
        ProtocolError: the block has no valid header, or the values do not fit it.
    """
    return {name: entry.shape for name, entry in _read_header(data).items()}


def tensors_digest(data: Packed) -> str:
    """Hex sha256 of a block."""
    return hashlib.sha256(data).hexdigest()


def _most_bytes(expected: Mapping[str, Shape], codec: CodecName) -> int:
    values = sum(coded_bytes(codec, shape) for shape in expected.values())
    # JSON may spell one character of a name as twelve bytes; 200 hold the rest of an entry, and
    # what fills up bytes. What cannot be deflated grows by less than a thousandth.
    header = sum(12 * len(name) + 200 + max(shape, default=0) for name, shape in expected.items())
    return _LENGTH_BYTES + header + values + 64


def _compare_names(found: Mapping[str, _Entry], expected: Mapping[str, Shape]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise ProtocolError(
            f"packed tensors: expected {len(expected)} tensors, {missing[0]} is missing"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ProtocolError(
            f"packed tensors: expected {len(expected)} tensors, got {shown(extra[0])} besides"
        )


# ---------------------------------------------------------------- the header


def _read_header(data: Packed) -> dict[str, _Entry]:
    if len(data) < _LENGTH_BYTES:
        raise ProtocolError(f"packed tensors: expected at least 8 bytes, got {len(data)}")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    most = min(MAX_HEADER_BYTES, len(data) - _LENGTH_BYTES)
    if length > most:
        raise ProtocolError(
            f"packed tensors: expected a header of at most {most} bytes, got {length}"
        )
    start = position = _LENGTH_BYTES + length
    entries: dict[str, _Entry] = {}
    for name, value in _parse_json(_inflated(data[_LENGTH_BYTES:start])).items():
        entries[name] = _entry(name, value, position)
        position = entries[name].end
    if position != len(data):
        raise ProtocolError(
            f"packed tensors: expected {position - start} bytes of values, got {len(data) - start}"
        )
    return entries


def _inflated(header: bytes) -> bytes:
    """The header's JSON; a few bytes can say that they stand for very many."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(header, MAX_HEADER_BYTES)
    except zlib.error:
        raise ProtocolError("packed tensors: the header is not deflated") from None
    if stream.unconsumed_tail or stream.unused_data or not stream.eof:
        raise ProtocolError(
            f"packed tensors: expected a header of at most {MAX_HEADER_BYTES} bytes inflated, "
            "and nothing behind it"
        )
    return text


def _parse_json(header: bytes) -> dict[str, object]:
    def object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        unique((name for name, _ in pairs), "packed tensors")
        return dict(pairs)

    try:
        tree = json.loads(header.decode("utf-8"), object_pairs_hook=object_without_repeats)
    except (ValueError, RecursionError):
        raise ProtocolError("packed tensors: the header is not valid JSON") from None
    if not isinstance(tree, dict):
        raise ProtocolError("packed tensors: expected a JSON object as header")
    return tree


def _entry(name: str, value: object, begin: int) -> _Entry:
    if not isinstance(value, list) or len(value) not in (2, 3):
        raise ProtocolError(f"tensor {shown(name)}: expected codec and shape in the header")
    codec, shape, *bits = value
    if codec not in CODECS:
        raise ProtocolError(
            f"tensor {shown(name)}: expected a codec of {', '.join(CODECS)}, "
            f"got {shown(str(codec))}"
        )
    if not _whole_numbers(shape) or len(shape) > 8:
        raise ProtocolError(f"tensor {shown(name)}: expected a shape, got {shown(str(shape))}")
    whole = tuple(shape)
    return _Entry(codec, whole, begin, _bits(name, codec, whole, bits[0]) if bits else None)


def _bits(name: str, codec: CodecName, shape: Shape, digits: object) -> tuple[int, ...]:
    rows = blocks_of(shape).rows
    good = isinstance(digits, str) and len(digits) == rows and set(digits) <= _DIGITS
    if codec not in ALLOTTED_CODECS or not good:
        raise ProtocolError(
            f"tensor {shown(name)}: expected {rows} digits of 0..{MOST_BITS} as bits of a "
            f"{' or '.join(ALLOTTED_CODECS)} tensor, got {shown(str(digits))}"
        )
    return tuple(map(int, str(digits)))


def _whole_numbers(values: object) -> bool:
    """Whether it is a list of integers in 0..2^48; a bool is none."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**48 for value in values
    )
