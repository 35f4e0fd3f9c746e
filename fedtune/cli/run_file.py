"""Writes a run file from the config tree itself, so that keys and comments cannot drift from it.

Comments and values are those of `fedtune.sections.toml_text`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from fedtune.errors import ConfigError
from fedtune.sections.toml_text import (
    Values,
    comment,
    key_lines,
    literal,
    section_class,
    section_lines,
    section_title,
)
from fedtune.settings import DeviceClassSection, RunConfig


class TemplateName(enum.StrEnum):
    """What a new run file is for."""

    CAUSAL_LM = "causal-lm"
    CLASSIFICATION = "classification"


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
"""Keys whose default is their absence."""


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
            lines += section_lines(name, section_class(field), values, _EXAMPLES)
    return "\n".join(lines) + "\n"


def _fleet() -> Iterator[str]:
    yield from (
        "",
        *comment(section_title(DeviceClassSection)),
        "# One section per class, of any name.",
    )
    for index, (name, values) in enumerate(_FLEET.items()):
        yield from ("", f"[fleet.{name}]")
        if index == 0:
            own = {f"fleet.{name}.{key}": value for key, value in values.items()}
            yield from key_lines(f"fleet.{name}", DeviceClassSection, own, _EXAMPLES)
        else:
            fields = DeviceClassSection.model_fields
            yield from (f"{key} = {literal(value, fields[key])}" for key, value in values.items())
