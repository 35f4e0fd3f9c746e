"""Checks of single fields of a message: every value is in its range before it is used.

A message that arrives may have been written by anyone. Each check takes the value and the name of
its field, and returns the value or raises `ProtocolError` in words that name the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fedtune.errors import ProtocolError

MAX_MESSAGE_BYTES = 16 * 2**20
"""A plan of 20,000 matrices takes about 2 MB; nothing honest comes near this."""
MAX_TEXT = 512
MAX_ENTRIES = 20_000
"""Matrices of a plan; Llama 405B has 882."""
MAX_COUNT = 10**15
"""Samples, tokens, bytes: above any real number, and exact as a float."""
MAX_RANK = 4096
MAX_DEVICES = 1_000_000
"""That one site may stand for as their coordinator."""

_MessageT = TypeVar("_MessageT", bound=Message)


def parse(message: _MessageT, data: bytes, name: str) -> _MessageT:
    """Fill an empty protobuf message from bytes.

    Raises:
        ProtocolError: the bytes are too many or are no such message.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{name}: expected at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}")
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise ProtocolError(f"{name}: {len(data)} bytes are not a {name} message") from None
    return message


def shown(text: str, longest: int = 60) -> str:
    """A text from outside, short and without control characters, for an error message."""
    return ascii(text if len(text) <= longest else text[: longest - 3] + "...")


def text(value: str, field: str, *, longest: int = MAX_TEXT, empty: bool = False) -> str:
    """A printable text of bounded length; control characters would reach a terminal."""
    if len(value) > longest:
        raise ProtocolError(f"{field}: expected at most {longest} characters, got {len(value)}")
    if not value and not empty:
        raise ProtocolError(f"{field}: expected a text, got none")
    if not value.isprintable():
        raise ProtocolError(f"{field}: expected printable characters, got {shown(value)}")
    return value


def one_of(value: str, field: str, allowed: Iterable[str]) -> str:
    """A text out of a fixed set."""
    names = tuple(allowed)
    if value not in names:
        raise ProtocolError(f"{field}: expected one of {', '.join(names)}, got {shown(value)}")
    return value


def whole(value: int, field: str, low: int, high: int) -> int:
    """A whole number in low..high, both included."""
    if not low <= value <= high:
        raise ProtocolError(f"{field}: expected {low}..{high}, got {value}")
    return value


def real(value: float, field: str, low: float = -1e300, high: float = 1e300) -> float:
    """A finite number in low..high, both included."""
    if not math.isfinite(value):
        raise ProtocolError(f"{field}: expected a finite number, got {value}")
    if not low <= value <= high:
        raise ProtocolError(f"{field}: expected {low:g}..{high:g}, got {value:g}")
    return value


def count(values: Sized, field: str, most: int = MAX_ENTRIES) -> None:
    """Refuse more than `most` entries."""
    if len(values) > most:
        raise ProtocolError(f"{field}: expected at most {most} entries, got {len(values)}")


def unique(names: Iterable[str], field: str) -> None:
    """Refuse a name that comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ProtocolError(f"{field}: {shown(name)} comes twice")
        seen.add(name)


def texts(values: Sequence[str], field: str) -> tuple[str, ...]:
    """Texts of which none comes twice, in their order."""
    count(values, field)
    unique(values, field)
    return tuple(text(value, field) for value in values)


def reals(
    values: Mapping[str, float], field: str, low: float = -1e300, most: int = 256
) -> dict[str, float]:
    """Named finite numbers, sorted by name."""
    count(values, field, most)
    return {
        text(name, f"{field} name"): real(values[name], f"{field}[{shown(name)}]", low)
        for name in sorted(values)
    }
