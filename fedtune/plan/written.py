"""A plan file as a person left it: its keys and types checked, and nothing else yet."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import PlanError, one_line
from fedtune.plan.plan_file import LAYOUT

MOST_BYTES = 256 * 2**20
"""Largest file that is read: ten thousand devices, each with its own entry of 200 matrices."""
NAMED = 5
"""Names that an error lists before it counts the rest."""


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Entry(_Written):
    """What a file says of a device or of a class; a key that is absent is None or empty.

    Attributes:
        class_: for a device: the class whose entry holds where this one is silent.
    """

    class_: str | None = Field(None, alias="class")
    format: str | None = None
    formats: dict[str, str] = {}
    rank: int | None = None
    ranks: dict[str, int] = {}
    tail: int | None = None
    micro_batch: int | None = Field(None, ge=1, le=2**16)
    batch_size: int | None = Field(None, ge=1, le=2**24)
    sequence_length: int | None = Field(None, ge=1, le=2**24)
    local_steps: int | None = Field(None, ge=1, le=10**9)
    checkpointing: bool | None = None
    predicted: Any = None  # for people; not read


class Base(_Written):
    """Which base a plan is for; see `ModelShapes`."""

    digest: str | None = None
    headers: str | None = None


class WrittenPlan(_Written):
    """A plan file as it stands, its keys and types checked and nothing else."""

    layout: Literal["fedtune-plan-1"]
    run: str = ""
    base: Base
    made_with: Any = None  # for people; not read
    predicted: Any = None  # for people; not read
    classes: dict[str, Entry] = {}
    devices: dict[str, str | Entry] = {}
    checksum: str = ""


def read_plan(path: Path) -> WrittenPlan:
    """The plan in a file.

    Raises:
        PlanError: the file cannot be read, is no plan, or has an unknown key or a value of another
            type; the message names the first.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise PlanError(f"{path}: expected at most {MOST_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PlanError(
            f"plan {path} cannot be read ({error.strerror}); write one with: fedtune plan RUN.toml"
        ) from None
    except json.JSONDecodeError as error:
        raise PlanError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}; is a comma missing?"
        ) from None
    except (ValueError, RecursionError):
        raise PlanError(f"{path} is not a plan: it is not JSON in UTF-8") from None
    if not isinstance(tree, dict) or tree.get("layout") != LAYOUT:
        raise PlanError(f"{path} is not a plan of layout {LAYOUT}; write one with: fedtune plan")
    try:
        return WrittenPlan.model_validate(tree)
    except ValidationError as error:
        raise PlanError(one_line(f"{path}: {_type_error(error)}")) from None


# ---------------------------------------------------------------- words


def _type_error(error: ValidationError) -> str:
    """The first thing that is wrong with a file's keys and types, in one line."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part not in ("str", "Entry")]
    # A device is a text or an entry; where it is an entry, what is wrong with it is what counts.
    inside = [
        e for e in error.errors() if "Entry" in e["loc"] and len(e["loc"]) > len(first["loc"])
    ]
    if inside:
        first = inside[0]
        parts = [str(part) for part in first["loc"] if part != "Entry"]
    place = ".".join(parts)
    if first["type"] == "extra_forbidden":
        keys = Entry.model_fields if len(parts) > 2 else WrittenPlan.model_fields
        known = [field.alias or name for name, field in keys.items()]
        return f"unknown key {place}" + nearest(parts[-1], known, f"; known: {', '.join(known)}")
    if first["type"] == "missing":
        return f"missing key {place}"
    value = repr(first["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    message = first["msg"].removeprefix("Input should be ")
    return f"{place} is {shown}: expected {message}"


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """A question for the name that was meant, if one is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
