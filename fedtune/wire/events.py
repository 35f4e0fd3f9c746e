"""Events as JSON: the same object in the ledger, in `--json` output and in the metrics file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath

import numpy as np

from fedtune.records import Event


def event_object(event: Event) -> dict[str, object]:
    """The event as one flat JSON object: `kind` first, then its fields.

    Raises:
        ValueError: a field is called `kind`.
    """
    if "kind" in event.fields:
        raise ValueError(f"event {event.kind} must not have a field called kind")
    return {"kind": event.kind} | {name: plain(value) for name, value in event.fields.items()}


def plain(value: object) -> object:
    """The value in JSON's types; a number that is not finite becomes null, which JSON can say.

    Raises:
        TypeError: the value has no JSON form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(below) for key, below in value.items()}
    if isinstance(value, Set):
        return sorted(str(plain(below)) for below in value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(below) for below in value]
    raise TypeError(f"expected a JSON value, got {type(value).__name__}")


def json_line(value: object) -> str:
    """The value as JSON on one line, without spaces, in any language's letters."""
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
