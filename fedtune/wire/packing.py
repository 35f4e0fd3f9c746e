"""Tensors as they travel: one block of bytes in the safetensors layout, little-endian.

The layout is 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), and the
values without gaps. It is read here by hand and not by the safetensors package, because bytes from
a device are hostile and the refusal has to say which tensor is wrong: the header is bounded before
it is parsed, names and shapes must be exactly those expected, offsets must leave no gap, and every
value must be finite.

Source: https://github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fedtune.errors import ProtocolError
from fedtune.records import FloatArray
from fedtune.wire.fields import shown, unique

WireDtype = Literal["float32", "float16"]
Shape = tuple[int, ...]
Packed: TypeAlias = bytes | mmap
"""A block of packed tensors, in memory or as a file that is mapped in."""

MAX_HEADER_BYTES = 16 * 2**20
"""About 100,000 tensors, as many as a plan of the largest allowed size sends, at 150 bytes each."""

_NUMPY_DTYPE: dict[str, np.dtype[np.floating]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: Shape
    begin: int
    end: int


def round_to_wire(array: FloatArray, dtype: WireDtype) -> NDArray[np.float32]:
    """The float32 values that the other side will hold after `array` has travelled as `dtype`.

    Raises:
        ProtocolError: a value is not finite, or does not fit the dtype.
    """
    return _as_wire(array, dtype, "array").astype(np.float32)


def _as_wire(array: FloatArray, dtype: WireDtype, name: str) -> NDArray[np.floating]:
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(array).astype(np.dtype(dtype))
    if not np.isfinite(rounded).all():
        largest = float(np.abs(array).max())
        raise ProtocolError(
            f"{name}: expected finite {dtype} values, the largest is {largest:g}; "
            "lower train.learning_rate, or set wire.dtype to float32 if it is finite"
        )
    return rounded


def pack_tensors(tensors: Mapping[str, FloatArray], dtype: WireDtype) -> bytes:
    """Write tensors as one block; equal tensors give equal bytes, in whatever order they come.

    Raises:
        ProtocolError: a value is not finite, or does not fit the dtype.
    """
    return save({name: _as_wire(tensors[name], dtype, name) for name in sorted(tensors)})


class PackedTensors(Mapping[str, NDArray[np.float32]]):
    """A block whose names and shapes are checked, and whose values are read when asked for.

    A tensor comes out as a float32 array of its own memory, anew at each request.

    Args:
        data: what `pack_tensors` wrote, or what a hostile device says it did.
        expected: name -> shape of every tensor that must be in it, and of none besides.
        max_bytes: refuse a longer block unread; default: what the expected tensors take at most.

    Raises:
        ProtocolError: anything is off; the message names the tensor, what was expected and found.
            A value that is not finite is found when its tensor is read.
    """

    def __init__(
        self, data: Packed, expected: Mapping[str, Shape], max_bytes: int | None = None
    ) -> None:
        most = _most_bytes(expected) if max_bytes is None else max_bytes
        if len(data) > most:
            raise ProtocolError(f"packed tensors: expected at most {most} bytes, got {len(data)}")
        self._data, self._names = data, tuple(expected)
        self._start, self._entries = _read_header(data)
        _compare_names(self._entries, expected)
        for name, shape in expected.items():
            found = self._entries[name].shape
            if found != tuple(shape):
                raise ProtocolError(
                    f"tensor {name}: expected shape {tuple(shape)}, got {found[:8]}"
                )

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self._entries[name]
        dtype = _NUMPY_DTYPE[entry.dtype]
        count = math.prod(entry.shape)
        values = np.frombuffer(self._data, dtype, count, offset=self._start + entry.begin)
        if not np.isfinite(values).all():
            raise ProtocolError(f"tensor {name}: expected finite values, got nan or inf")
        # A copy, so that no array holds on to a mapped file that is to be closed.
        return values.astype(np.float32).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def unpack_tensors(
    data: Packed, expected: Mapping[str, Shape], max_bytes: int | None = None
) -> dict[str, NDArray[np.float32]]:
    """Read a whole block, as `PackedTensors` does, into memory."""
    return dict(PackedTensors(data, expected, max_bytes))


def packed_shapes(data: Packed) -> dict[str, Shape]:
    """Name -> shape of every tensor in a block, of which only the header is read.

    Raises:
        ProtocolError: the block has no valid header, or the values do not fit it.
    """
    return {name: entry.shape for name, entry in _read_header(data)[1].items()}


def tensors_digest(data: Packed) -> str:
    """Hex sha256 of a block."""
    return hashlib.sha256(data).hexdigest()


def _most_bytes(expected: Mapping[str, Shape]) -> int:
    values = sum(4 * math.prod(shape) for shape in expected.values())
    # JSON may spell one character of a name as twelve bytes; 200 hold the rest of an entry.
    header = sum(12 * len(name) + 200 for name in expected)
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


def _read_header(data: Packed) -> tuple[int, dict[str, _Entry]]:
    """Where the values start, and the entries; offsets count from there."""
    if len(data) < _LENGTH_BYTES:
        raise ProtocolError(f"packed tensors: expected at least 8 bytes, got {len(data)}")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    most = min(MAX_HEADER_BYTES, len(data) - _LENGTH_BYTES)
    if length > most:
        raise ProtocolError(
            f"packed tensors: expected a header of at most {most} bytes, got {length}"
        )
    start = _LENGTH_BYTES + length
    header = _parse_json(data[_LENGTH_BYTES:start])
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_offsets(entries, len(data) - start)
    return start, entries


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


def _entry(name: str, value: object) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ProtocolError(
            f"tensor {shown(name)}: expected dtype, shape and data_offsets in the header"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in ("F32", "F16"):
        raise ProtocolError(
            f"tensor {shown(name)}: expected dtype F32 or F16, got {shown(str(dtype))}"
        )
    if not _whole_numbers(shape) or len(shape) > 8:
        raise ProtocolError(f"tensor {shown(name)}: expected a shape, got {shown(str(shape))}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ProtocolError(
            f"tensor {shown(name)}: expected two offsets, got {shown(str(offsets))}"
        )
    begin, end = offsets
    size = math.prod(shape) * _NUMPY_DTYPE[dtype].itemsize
    if end - begin != size:
        raise ProtocolError(
            f"tensor {shown(name)}: expected {size} bytes for its shape, got {end - begin}"
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _whole_numbers(values: object) -> bool:
    """Whether it is a list of integers in 0..2^48; a bool is none."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**48 for value in values
    )


def _check_offsets(entries: Mapping[str, _Entry], total: int) -> None:
    """The values follow one another without gap or overlap, to the last byte."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ProtocolError(
                f"tensor {shown(name)}: expected its values at byte {position}, got {entry.begin}"
            )
        position = entry.end
    if position != total:
        raise ProtocolError(f"packed tensors: expected {position} bytes of values, got {total}")
