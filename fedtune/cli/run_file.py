"""Writes a run file from the config tree itself, so that keys and comments cannot drift from it.

A comment is a key's description and range, both taken from its pydantic field; a section's is the
first line of its class's docstring.
"""

from __future__ import annotations

import enum
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from fedtune.errors import ConfigError
from fedtune.settings import DeviceClassSection, RunConfig, parse_bytes

_WIDTH: Final = 96


class TemplateName(enum.StrEnum):
    """What a new run file is for."""

    CAUSAL_LM = "causal-lm"
    CLASSIFICATION = "classification"


Values = Mapping[str, object]
"""`section.key` -> value that a template sets instead of the default."""

_TEMPLATES: Final[Mapping[TemplateName, Values]] = {
    TemplateName.CAUSAL_LM: {
        "model.path": "HuggingFaceTB/SmolLM2-135M",
        "data.train": "train.jsonl",
    },
    TemplateName.CLASSIFICATION: {
        "model.path": "sentence-transformers/all-MiniLM-L6-v2",
        "model.task": "sequence-classification",
        "data.train": "train.jsonl",
        "data.format": "text-label",
        "data.max_tokens": 128,
    },
}
_FLEET: Final[Mapping[str, Mapping[str, object]]] = {
    "laptop": {"count": 2, "memory": 8 * 10**9},
    "board": {"count": 2, "memory": 4 * 10**9},
}
_EXAMPLES: Final[Mapping[str, str]] = {
    "device": '"raspberry-pi-5"',
    "sites": '{ north = "north.jsonl", south = "south.jsonl" }',
    "format": '"nf4"',
    "correction_rank": "8",
}
"""Keys whose default is their absence; they stand commented out, with an example."""


def write_run_file(path: Path, template: TemplateName) -> None:
    """Write a new run file.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(render_run_file(template))
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is not overwritten; name another file, or delete it first"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from None


def render_run_file(template: TemplateName) -> str:
    """The text of a run file with every key of the config tree."""
    lines = [
        "# A run of fedtune. Every key stands here with its default, but for those that the",
        "# template sets; a key that is left out keeps its default. Paths are relative to this",
        "# file. Check it with: fedtune check FILE",
    ]
    values = _TEMPLATES[template]
    for name, field in RunConfig.model_fields.items():
        if name == "fleet":
            lines += _fleet()
        else:
            lines += _section(name, _section_class(field), values)
    return "\n".join(lines) + "\n"


def _fleet() -> Iterator[str]:
    yield from ("", *_comment(_title(DeviceClassSection)), "# One section per class, of any name.")
    for index, (name, values) in enumerate(_FLEET.items()):
        yield from ("", f"[fleet.{name}]")
        if index == 0:
            own = {f"fleet.{name}.{key}": value for key, value in values.items()}
            yield from _keys(f"fleet.{name}", DeviceClassSection, own)
        else:
            fields = DeviceClassSection.model_fields
            yield from (f"{key} = {_literal(value, fields[key])}" for key, value in values.items())


def _section(path: str, section: type[BaseModel], values: Values) -> Iterator[str]:
    yield from ("", *_comment(_title(section)), f"[{path}]")
    yield from _keys(path, section, values)
    for name, field in section.model_fields.items():
        if _is_section(field):
            yield from _section(f"{path}.{name}", _section_class(field), values)


def _keys(path: str, section: type[BaseModel], values: Values) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if _is_section(field):
            continue
        allowed = _allowed(field)
        yield from _comment(f"{field.description}{f' ({allowed})' if allowed else ''}")
        value = values.get(f"{path}.{name}", field.get_default(call_default_factory=True))
        if name in _EXAMPLES and not value and not isinstance(value, tuple):
            yield f"# {name} = {_EXAMPLES[name]}"
        else:
            yield f"{name} = {_literal(value, field)}"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _section_class(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, BaseModel)
    return field.annotation


def _title(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _comment(text: str) -> list[str]:
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


def _literal(value: object, field: FieldInfo) -> str:
    """A value in TOML's form."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and _is_size(field):
        return f'"{_size(value)}"'
    if isinstance(value, float):
        return _number(value) if value % 1 or value >= 1e6 else f"{value:.1f}"
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item, field) for item in value)}]"
    # JSON's texts and integers are TOML's, too.
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _size(value: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= size and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value} B"
