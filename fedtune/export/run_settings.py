"""The few settings of a run that its watchers need, as its folder has them.

They are read leniently: a folder that is being made has no settings yet, and one of another
version may have others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.sections.federation import RunSection


def json_object(path: Path) -> Mapping[str, Any]:  # JSON values of many types
    """A JSON object of the folder; empty where there is none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def deadline_s(folder: Path) -> float:
    """How long a round may take, in seconds."""
    found = _setting(folder, "run", "round_deadline_s")
    return float(found) if isinstance(found, (int, float)) else usual_deadline_s()


def usual_deadline_s() -> float:
    """How long a round may take where nothing says so, in seconds."""
    usual: float = RunSection.model_fields["round_deadline_s"].default
    return usual


def planned_rounds(folder: Path) -> int | None:
    """Rounds that the run is to have."""
    found = _setting(folder, "run", "rounds")
    return found if isinstance(found, int) else None


def devices_at_once(folder: Path) -> int:
    """Simulated devices that train at the same time; 0: all."""
    if _setting(folder, "simulation", "backend") != "ray":
        return 1
    workers = _setting(folder, "simulation", "workers")
    return workers if isinstance(workers, int) else 0


def _setting(folder: Path, section: str, key: str) -> object:
    values = json_object(folder / "config.json").get(section)
    return values.get(key) if isinstance(values, dict) else None
