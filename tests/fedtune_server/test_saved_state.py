"""All that a run needs to go on is in its checkpoint, exactly."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import RunError
from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    GlobalAdapter,
    LowRank,
    MatrixPlan,
    SiteReport,
)
from fedtune.wire.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedtune_server.drift import Standing
from fedtune_server.saved_state import find_state, saved_state, state_checkpoint
from fedtune_server.state import Held, Known, RunState, Turns

BASE = "d" * 64


def adapter(round: int, seed: int) -> GlobalAdapter:
    rng = np.random.default_rng(seed)
    # Transposed views, as a join may leave them.
    pair = LowRank(rng.normal(size=(2, 8)).T, np.array([2.0, 1.0]), rng.normal(size=(2, 5)).T)
    return GlobalAdapter(round, {"up": pair}, {"head": np.ones((2, 3), np.float32)}, {"up": 0.1})


def state() -> RunState:
    profile = DeviceProfile(
        "Süd", "board", 4, 10**9, "cuda", 10**8, {"fp32": 1e9 / 3}, 1e9, 1e6, ("nf4", "fp32"),
        {"torch": "2"}, "fp32",
    )  # fmt: skip
    matrices = (MatrixPlan("up", 4, "nf4", 2, 64, 1), MatrixPlan("down", 0, "fp32"))
    plan = DevicePlan("Süd", matrices, 2, 8, 128, 5, True, 1, 1000, 1 / 3, 10, 20, "memory")
    return RunState(
        run="unit-1",
        adapter=adapter(7, 1),
        server={"momentum": adapter(7, 2)},
        plans={"Süd": plan, "b": replace(plan, device="b")},
        turns={"b": Turns(3, 6)},
        held={"Süd": Held(profile, Standing(10**8, 1.1, (1.2, 0.1 + 0.2), (5,), 3, 8, -1), 9.5)},
        known=Known(
            reports={
                "Süd": SiteReport(profile, BASE, 10, 2, 99, {"head": (0, 4)}, ("no", "yes"), ("!",))
            },
            calibration={"board": CostCalibration(1.1, 0.9, 1e-3)},
            digests={"importance.json": "0" * 64},
        ),
        held_out_loss_before=math.pi,
        planned_seconds=2 / 3,
    )


def equal(left: GlobalAdapter, right: GlobalAdapter) -> None:
    assert (left.round, left.dropped_energy) == (right.round, right.dropped_energy)
    for name, pair in left.matrices.items():
        for factor in ("u", "sigma", "v"):
            ours, theirs = getattr(pair, factor), getattr(right.matrices[name], factor)
            assert ours.dtype == theirs.dtype
            assert ours.flags.c_contiguous
            np.testing.assert_array_equal(ours, theirs)
    assert left.dense.keys() == right.dense.keys()


def test_a_state_comes_back_whole_and_in_its_order(tmp_path: Path) -> None:
    before = state()
    # A new field of a record must not be left at its default here.
    for record in (before, before.held["Süd"].standing, before.known, before.plans["Süd"]):
        for field in fields(record):
            assert getattr(record, field.name) or field.name == "first_trained_layer"
    written = state_checkpoint(before, BASE)
    write_checkpoint(tmp_path, written.adapter, written.extra, written.meta)
    found = find_state(tmp_path, BASE, "unit-1")
    assert found is not None
    assert found.skipped == ()
    after = found.state
    for name in ("run", "plans", "turns", "held", "known", "held_out_loss_before", "round"):
        assert getattr(after, name) == getattr(before, name)
    assert after.planned_seconds == before.planned_seconds
    assert list(after.plans) == list(before.plans)
    equal(after.adapter, before.adapter)
    equal(after.server["momentum"], before.server["momentum"])


def test_the_name_of_the_run_is_not_in_it_and_alike_matrices_are_once() -> None:
    one, other = (state_checkpoint(replace(state(), run=run), BASE) for run in ("a", "b"))
    assert one.meta == other.meta
    assert len(json.loads(one.meta["state"])["matrices"]) == 1


def test_another_base_and_another_version_are_errors_in_words(tmp_path: Path) -> None:
    written = state_checkpoint(state(), BASE)
    with pytest.raises(RunError, match=r"base of digest d{12}, the one at hand has e{12}; name"):
        saved_state(written, "e" * 64, "unit-1")
    for text in ("{}", "[]", '{"layout": 2}', '{"layout": 1}', "x"):
        other = Checkpoint(written.adapter, {}, {"base_digest": BASE, "state": text})
        with pytest.raises(RunError, match=r"round 7 was written by another version of fedtune"):
            saved_state(other, BASE, "unit-1")
    path = write_checkpoint(tmp_path, written.adapter, {}, {"base_digest": BASE})
    with pytest.raises(RunError, match="another version"):
        saved_state(read_checkpoint(path), BASE, "unit-1")
    assert find_state(tmp_path / "nothing", BASE, "") is None
