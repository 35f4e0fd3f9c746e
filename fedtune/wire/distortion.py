"""A distortion table as a JSON file: written where the base is, read by a coordinator.

    {"layout": "fedtune-distortion-1", "base_digest": "...", "weighting": "none",
     "forms": [{"format": "q2", "block_size": 64, "correction_rank": 0}, ...],
     "errors": {"model.layers.0.self_attn.q_proj": [1.25, ...], ...}}

An error is null where the matrix cannot have the form. The file may come from a site, so it is
checked like a message.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

from fedtune.errors import ProtocolError
from fedtune.records import BACKBONE_FORMATS, DistortionTable, FormatName, MatrixForm
from fedtune.wire import fields

LAYOUT = "fedtune-distortion-1"
_MOST_FORMS = 1024
_MOST_BYTES = 64 * 2**20


def distortion_json(table: DistortionTable) -> dict[str, object]:
    """The table as JSON values; equal tables give equal values in the same order."""
    return {
        "layout": LAYOUT,
        "base_digest": table.base_digest,
        "weighting": table.weighting,
        "forms": [
            {
                "format": form.format,
                "block_size": form.block_size,
                "correction_rank": form.correction_rank,
            }
            for form in table.forms
        ],
        "errors": {
            name: [error if math.isfinite(error) else None for error in errors]
            for name, errors in sorted(table.errors.items())
        },
    }


def read_distortion(path: Path) -> DistortionTable:
    """The table in a file.

    Raises:
        ProtocolError: the file cannot be read, or is no such table.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ProtocolError(f"{path}: expected at most {_MOST_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProtocolError(
            f"distortion table {path} cannot be read ({error.strerror}); write one with: "
            "fedtune measure RUN.toml"
        ) from None
    except (ValueError, RecursionError):
        raise ProtocolError(f"{path} is not a distortion table: it is not JSON") from None
    if not isinstance(tree, dict) or tree.get("layout") != LAYOUT:
        raise ProtocolError(f"{path} is not a distortion table of layout {LAYOUT}")
    try:
        return _table(tree)
    except (KeyError, TypeError, AttributeError):
        raise ProtocolError(f"{path} is not a distortion table: a field is missing") from None
    except ValueError as error:
        raise ProtocolError(f"{path}: {error}") from None


def _table(tree: dict[str, object]) -> DistortionTable:
    forms, errors = tree["forms"], tree["errors"]
    if not isinstance(forms, list) or not isinstance(errors, dict):
        raise TypeError
    fields.count(forms, "forms", _MOST_FORMS)
    fields.count(errors, "errors")
    return DistortionTable(
        base_digest=fields.text(_str(tree["base_digest"]), "base_digest"),
        weighting=fields.text(_str(tree["weighting"]), "weighting"),
        forms=tuple(_form(form) for form in forms),
        errors={fields.text(name, "errors"): _errors(name, row) for name, row in errors.items()},
    )


def _form(value: dict[str, object]) -> MatrixForm:
    name = fields.one_of(_str(value["format"]), "format", BACKBONE_FORMATS)
    return MatrixForm(
        cast(FormatName, name),
        fields.whole(_int(value["block_size"]), "block_size", 0, 2**24),
        fields.whole(_int(value["correction_rank"]), "correction_rank", 0, fields.MAX_RANK),
    )


def _errors(name: str, row: list[float | None]) -> tuple[float, ...]:
    return tuple(
        math.inf if error is None else fields.real(float(error), f"error of {name}", low=0.0)
        for error in row
    )


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _int(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value
