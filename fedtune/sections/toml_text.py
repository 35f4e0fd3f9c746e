"""TOML files written from the config tree itself, so that keys and comments cannot drift from it.

A comment is a key's description and range, both taken from its pydantic field; a section's is the
first line of its class's docstring.
"""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Final

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from fedtune.sections.section import parse_bytes

Values = Mapping[str, object]
"""`section.key` -> value that stands instead of the default."""
Examples = Mapping[str, str]
"""Keys whose default is their absence; they stand commented out, with an example."""
NO_EXAMPLES: Final[Examples] = {}

_WIDTH: Final = 96


def section_lines(
    path: str, section: type[BaseModel], values: Values, examples: Examples = NO_EXAMPLES
) -> Iterator[str]:
    """The lines of a section, and of those inside it."""
    yield from ("", *comment(section_title(section)), f"[{path}]")
    yield from key_lines(path, section, values, examples)
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from section_lines(_join(path, name), section_class(field), values, examples)


def file_lines(section: type[BaseModel], values: Values) -> Iterator[str]:
    """The lines of a whole file: keys above all sections first, as TOML wants it."""
    yield from key_lines("", section, values)
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from section_lines(name, section_class(field), values)


def key_lines(
    path: str, section: type[BaseModel], values: Values, examples: Examples = NO_EXAMPLES
) -> Iterator[str]:
    """The lines of a section's own keys; `path` is empty for those above all sections."""
    for name, field in section.model_fields.items():
        if _is_section(field):
            continue
        allowed = _allowed(field)
        yield from comment(f"{field.description}{f' ({allowed})' if allowed else ''}")
        value = values.get(_join(path, name), field.get_default(call_default_factory=True))
        if name in examples and not value and not isinstance(value, tuple):
            yield f"# {name} = {examples[name]}"
        else:
            yield f"{name} = {literal(value, field)}"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def section_class(field: FieldInfo) -> type[BaseModel]:
    """The class of a key that is a section."""
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, BaseModel)
    return field.annotation


def section_title(section: type[BaseModel]) -> str:
    """What a section is, in a line."""
    return (section.__doc__ or "").strip().splitlines()[0]


def comment(text: str) -> list[str]:
    """A text as comment lines of TOML."""
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="#   ")


def _allowed(field: FieldInfo) -> str:
    """What a key takes, in words: its choices or its range."""
    choices = _choices(field.annotation)
    if choices:
        return " | ".join(choices)
    if field.annotation is bool:
        return "true | false"
    signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    limits = [
        f"{sign} {_number(getattr(limit, attribute))}"
        for kind, (sign, attribute) in signs.items()
        for limit in field.metadata
        if isinstance(limit, kind)
    ]
    if _is_size(field):
        return "such as 8 GB or 512 MiB"
    return ", ".join(limits)


def _choices(annotation: object) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (tuple, types.UnionType, typing.Union):
        return [choice for inner in typing.get_args(annotation) for choice in _choices(inner)]
    return []


def _is_size(field: FieldInfo) -> bool:
    return any(
        isinstance(entry, BeforeValidator) and entry.func is parse_bytes for entry in field.metadata
    )


def literal(value: object, field: FieldInfo) -> str:
    """A value in TOML's form."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and _is_size(field):
        return f'"{_size(value)}"'
    if isinstance(value, float):
        return _number(value) if value % 1 or value >= 1e6 else f"{value:.1f}"
    if isinstance(value, tuple):
        return f"[{', '.join(literal(item, field) for item in value)}]"
    # JSON's texts and integers are TOML's, too.
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _size(value: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= size and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value} B"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
