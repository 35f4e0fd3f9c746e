"""An importance report as a JSON file: what a run found, for itself and for later runs.

    {"layout": "fedtune-importance-1", "base_digest": "...", "method": "spectrum", "tokens": 4711,
     "gain_per_rank": {"model.layers.0.self_attn.q_proj": [0.8, 0.3, ...], ...}}

The file may come from a site, so it is checked like a message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast, get_args

from fedtune.errors import ProtocolError
from fedtune.records import ImportanceMethod, ImportanceReport
from fedtune.wire import fields

LAYOUT = "fedtune-importance-1"
_MOST_BYTES = 256 * 2**20
_AGAIN = "let the devices measure again: leave importance.file empty"


def importance_json(report: ImportanceReport, base_digest: str) -> dict[str, object]:
    """The report as JSON values; equal reports give equal values in the same order."""
    return {
        "layout": LAYOUT,
        "base_digest": base_digest,
        "method": report.method,
        "tokens": report.tokens,
        "gain_per_rank": {
            name: list(gains) for name, gains in sorted(report.gain_per_rank.items())
        },
    }


def read_importance(path: Path, base_digest: str) -> ImportanceReport:
    """The report in a file.

    Args:
        base_digest: of the base that it has to be of.

    Raises:
        ProtocolError: the file cannot be read, is no such report, or is of another base.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ProtocolError(f"{path}: expected at most {_MOST_BYTES} bytes; {_AGAIN}")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProtocolError(
            f"importance report {path} cannot be read ({error.strerror}); {_AGAIN}"
        ) from None
    except (ValueError, RecursionError):
        raise ProtocolError(f"{path} is not an importance report: it is not JSON") from None
    if not isinstance(tree, dict) or tree.get("layout") != LAYOUT:
        raise ProtocolError(f"{path} is not an importance report of layout {LAYOUT}; {_AGAIN}")
    try:
        found, report = _report(tree)
    except (KeyError, TypeError):
        raise ProtocolError(f"{path} is not an importance report: a field is missing") from None
    except ProtocolError as error:
        raise ProtocolError(f"{path}: {error}") from None
    if found != base_digest:
        raise ProtocolError(
            f"{path} is of another base model: expected digest {base_digest[:12]}, "
            f"found {found[:12]}; {_AGAIN}"
        )
    return report


def _report(tree: dict[str, object]) -> tuple[str, ImportanceReport]:
    digest, method, tokens, gains = (
        tree[key] for key in ("base_digest", "method", "tokens", "gain_per_rank")
    )
    if not isinstance(digest, str) or not isinstance(method, str) or type(tokens) is not int:
        raise TypeError
    if not isinstance(gains, dict):
        raise TypeError
    fields.count(gains, "gain_per_rank")
    return fields.text(digest, "base_digest"), ImportanceReport(
        gain_per_rank={
            fields.text(name, "gain_per_rank"): _gains(name, values)
            for name, values in gains.items()
        },
        tokens=fields.whole(tokens, "tokens", 0, fields.MAX_COUNT),
        method=cast(ImportanceMethod, fields.one_of(method, "method", get_args(ImportanceMethod))),
    )


def _gains(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise TypeError
    fields.count(values, f"gains of {fields.shown(name)}", fields.MAX_RANK)
    return tuple(fields.real(float(v), f"gain of {fields.shown(name)}", low=0.0) for v in values)
