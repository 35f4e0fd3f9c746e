"""A run's state as a checkpoint, and back.

Adapters go into a checkpoint as tensors. All else is one JSON text among its texts, `state`, whose
objects have the fields of the records. The matrices of a plan, which are the bulk and alike for the
devices of a class, are written once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.errors import RunError
from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    MatrixPlan,
    SiteReport,
)
from fedtune.wire.checkpoint import Checkpoint, as_written, find_checkpoint
from fedtune_server.drift import Standing
from fedtune_server.state import Held, Known, RunState, Turns

_LAYOUT = 1
_Tree: TypeAlias = dict[str, Any]
"""A JSON object: its values are of many types, and a record checks its own."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a run goes on from.

    Attributes:
        skipped: why each newer checkpoint is not used, newest first; one line each.
    """

    state: RunState
    skipped: tuple[str, ...] = ()


def state_checkpoint(state: RunState, base_digest: str) -> Checkpoint:
    """What is written of a state; two runs of one seed write the same, whatever they are called."""
    tables: dict[tuple[MatrixPlan, ...], int] = {}
    plans = {name: _plan_tree(plan, tables) for name, plan in state.plans.items()}
    tree = {
        "layout": _LAYOUT,
        "plans": plans,
        "matrices": [[asdict(matrix) for matrix in table] for table in tables],
        "turns": {name: asdict(turns) for name, turns in state.turns.items()},
        "held": {name: _held_tree(held) for name, held in state.held.items()},
        "reports": {name: asdict(report) for name, report in state.known.reports.items()},
        "calibration": {name: asdict(found) for name, found in state.known.calibration.items()},
        "digests": dict(state.known.digests),
        "held_out_loss_before": state.held_out_loss_before,
        "planned_seconds": state.planned_seconds,
    }
    meta = {"base_digest": base_digest, "state": json.dumps(tree)}
    return Checkpoint(state.adapter, state.server, meta)


def saved_state(checkpoint: Checkpoint, base_digest: str, run: str) -> RunState:
    """The state that a checkpoint holds.

    Raises:
        RunError: it is of another base, or was written by another version of fedtune.
    """
    meta = checkpoint.meta
    found = meta.get("base_digest", "")
    if found != base_digest:
        raise RunError(
            f"the run was trained on a base of digest {found[:12]}, the one at hand has "
            f"{base_digest[:12]}; name the same model.path, or start anew with --overwrite"
        )
    try:
        tree = json.loads(meta["state"])
        if tree["layout"] != _LAYOUT:
            raise ValueError(f"its layout is {tree['layout']!r}")
        return _state(checkpoint, tree, run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"the checkpoint of round {checkpoint.adapter.round} was written by another version of "
            f"fedtune ({error}); go on with that version, or start anew with --overwrite"
        ) from None


def find_state(folder: Path, base_digest: str, run: str) -> Saved | None:
    """The state in the newest checkpoint of a folder that is whole; None where none was written.

    Raises:
        RunError: none is whole, or as for `saved_state`.
    """
    found = find_checkpoint(folder)
    if found is None:
        return None
    return Saved(saved_state(found.checkpoint, base_digest, run), found.skipped)


def _state(checkpoint: Checkpoint, tree: _Tree, run: str) -> RunState:
    tables = [tuple(MatrixPlan(**matrix) for matrix in table) for table in tree["matrices"]]
    known = Known(
        reports={name: _report(report) for name, report in tree["reports"].items()},
        calibration={name: CostCalibration(**c) for name, c in tree["calibration"].items()},
        digests=tree["digests"],
    )
    return RunState(
        run=run,
        adapter=as_written(checkpoint.adapter),
        server={name: as_written(state) for name, state in checkpoint.extra.items()},
        plans={
            name: DevicePlan(**(plan | {"matrices": tables[plan["matrices"]]}))
            for name, plan in tree["plans"].items()
        },
        turns={name: Turns(**turns) for name, turns in tree["turns"].items()},
        held={name: _held(held) for name, held in tree["held"].items()},
        known=known,
        held_out_loss_before=tree["held_out_loss_before"],
        planned_seconds=tree["planned_seconds"],
    )


def _plan_tree(plan: DevicePlan, tables: dict[tuple[MatrixPlan, ...], int]) -> _Tree:
    number = tables.setdefault(plan.matrices, len(tables))
    return {name: getattr(plan, name) for name in DevicePlan.__slots__} | {"matrices": number}


def _held_tree(held: Held) -> _Tree:
    return {
        "profile": asdict(held.profile),
        "standing": asdict(held.standing),
        "hopeless_bytes": held.hopeless_bytes,
    }


def _held(tree: _Tree) -> Held:
    standing = tree["standing"]
    lists = {key: tuple(standing[key]) for key in ("ratios", "room")}
    return Held(
        profile=_profile(tree["profile"]),
        standing=Standing(**(standing | lists)),
        hopeless_bytes=tree["hopeless_bytes"],
    )


def _profile(tree: _Tree) -> DeviceProfile:
    return DeviceProfile(**(tree | {"formats": tuple(tree["formats"])}))


def _report(tree: _Tree) -> SiteReport:
    read = {
        "profile": _profile(tree["profile"]),
        "dense": {name: tuple(shape) for name, shape in tree["dense"].items()},
        "labels": tuple(tree["labels"]),
        "warnings": tuple(tree["warnings"]),
    }
    return SiteReport(**(tree | read))
