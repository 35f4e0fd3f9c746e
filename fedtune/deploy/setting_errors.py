"""What is wrong with a settings file, in one line for a person."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError

from fedtune.errors import one_line


def first_error(error: ValidationError, section: type[BaseModel]) -> str:
    """The first thing that is wrong: its key, and what to do.

    Args:
        section: what the file is read as.
    """
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _keys(section, place[:-1])
        near = get_close_matches(place[-1], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return one_line(f"unknown key {key}; {remedy}", 300)
    return one_line(f"{key}: {first['msg']}; found {first['input']!r}", 300)


def _keys(section: type[BaseModel], below: Sequence[str]) -> list[str]:
    """The keys of a section, or of one below it."""
    for name in below:
        inner = section.model_fields[name].annotation if name in section.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return list(section.model_fields)
