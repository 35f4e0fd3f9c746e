"""What the coordinator asks of the devices before it plans, and what it makes of the answers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import parse_run_config
from fedtune.errors import ProtocolError
from fedtune.records import DeviceProfile
from fedtune.wire.calibration import (
    CalibrationInstruction,
    CalibrationReport,
    calibration_shapes,
)
from fedtune.wire.importance import read_importance
from fedtune.wire.packing import pack_tensors, tensors_digest
from fedtune_server.coordinator import Coordinator
from fedtune_server.planning import Planning
from fedtune_server.roster import Counted
from fedtune_server.run_folder import RunFolder

FakeFleet = Any  # tests/fedtune_server/conftest.py
FleetOf = Callable[..., FakeFleet]
Play = Callable[..., Any]
UP, DOWN = "layers.0.up", "layers.0.down"
TREE: dict[str, dict[str, Any]] = {
    "run": {"name": "unit", "rounds": 1, "round_deadline_s": 30.0},
    "model": {"path": "not/read/here"},
    "data": {"train": "not-read.jsonl", "max_tokens": 16},
    "fleet": {"any": {"count": 3, "memory": "1 GB"}},
    "lora": {"rank_max": 3, "rank_cap": 6},
    "train": {"batch_size": 4, "local_steps": 3},
    "importance": {"method": "sensitivity", "batches": 2},
}


class Device:
    """Answers a measurement with a sensitivity of its own for each matrix."""

    def __init__(self, fleet: FakeFleet, values: Mapping[str, float], step: float = 0.0) -> None:
        self._fleet, self._values, self._step = fleet, values, step
        self.orders: list[CalibrationInstruction] = []
        self.spoil: Callable[[CalibrationReport], CalibrationReport] = lambda report: report

    def __call__(self, order: CalibrationInstruction) -> tuple[CalibrationReport, bytes]:
        self.orders.append(order)
        shapes = calibration_shapes(order.method, order.rank, self._fleet.shapes.matrices)
        sums = {
            name: np.full(shape, self._values[name.rpartition(".")[0]], np.float32)
            for name, shape in shapes.items()
        }
        packed = pack_tensors(sums, "fp32")
        asked = 4 * order.batches if order.method else 0
        report = CalibrationReport(
            run=order.run,
            device=order.plan.device,
            base_digest=order.base_digest,
            method=order.method,
            samples=asked,
            units=5 * asked,
            tokens=10 * asked,
            passes=order.batches if order.method else 0,
            tensors_digest=tensors_digest(packed),
            seconds=0.5,
            step_seconds=self._step,
            step_peak_bytes=int(1e6 * self._step),
        )
        return self.spoil(report), packed


@pytest.fixture
def tree() -> dict[str, dict[str, Any]]:
    return copy.deepcopy(TREE)


@pytest.fixture
def fleet(fleet_of: FleetOf) -> FakeFleet:
    fake = fleet_of("a", "b", "c")
    fake.calibrated = {
        "a": Device(fake, {UP: 1.0, DOWN: 3.0}),
        "b": Device(fake, {UP: 2.0, DOWN: 1.0}),
        "c": Device(fake, {UP: 1.0, DOWN: 4.0}),
    }
    return fake


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    with RunFolder.create(tmp_path) as folder:

        def run(fake: FakeFleet, tree: Any, fault: Any = None) -> Coordinator:
            config = parse_run_config(tree, "test")
            coordinator = Coordinator(config, fake.shapes, folder, fake.events.append)
            with fake.grid(fault) as grid:
                coordinator.run(grid, Counted(len(fake.names)))
            return coordinator

        yield run


def test_the_report_is_of_all_devices_sums(
    fleet: FakeFleet, play: Play, tree: Any, tmp_path: Path
) -> None:
    play(fleet, tree)
    (found,) = fleet.all("importance_found")
    assert (found["method"], found["source"], found["tokens"]) == ("sensitivity", "measured", 240)
    assert found["top"] == {DOWN: 0.6667, UP: 0.3333}
    report = read_importance(tmp_path / "importance.json", fleet.shapes.digest)
    ups, downs = (report.gain_per_rank[name] for name in (UP, DOWN))
    assert downs[0] == pytest.approx(2 * ups[0], rel=1e-4)
    assert (report.tokens, report.method, len(ups)) == (240, "sensitivity", 3)


def test_what_is_measured_is_listed_and_told(fleet: FakeFleet, play: Play, tree: Any) -> None:
    play(fleet, tree)
    kinds = [event.kind for event in fleet.events]
    before, round_ = fleet.all("leaves_device")
    assert (before["stage"], round_["stage"]) == ("calibration", "round")
    assert before["tensors"] == [
        {"name": f"{name}.sensitivity", "shape": [1], "bytes": 4} for name in (DOWN, UP)
    ]
    assert kinds.index("leaves_device") < kinds.index("device_calibrated") < kinds.index("planned")
    told = fleet.all("device_calibrated")
    assert [one["device"] for one in told] == ["a", "b", "c"]
    assert all(one["upload_bytes"] > 8 and one["step_seconds"] is None for one in told)
    (finished,) = fleet.all("calibration_finished")
    assert (finished["devices"], finished["refused"]) == (3, 0)


def test_devices_measure_under_a_plan_that_fits_them(
    fleet: FakeFleet, play: Play, tree: Any
) -> None:
    tree["run"]["seed"] = 9
    play(fleet, tree)
    for name, device in fleet.calibrated.items():
        (order,) = device.orders
        assert (order.plan.device, order.seed, order.batches, order.rank) == (name, 9, 2, 3)
        assert 0 < order.plan.peak_bytes <= 10**9


def test_the_plan_follows_the_report(fleet: FakeFleet, play: Play, tree: Any) -> None:
    tree["fleet"]["any"]["upload"] = 4 * 20 + 24  # one rank of one matrix, and a header
    tree["run"]["devices_per_round"] = 1
    ranks = []
    for up, down in ((9.0, 1.0), (1.0, 9.0)):
        for name in fleet.names:
            fleet.calibrated[name] = Device(fleet, {UP: up, DOWN: down})
        fleet.events.clear()
        play(fleet, tree)
        ranks.append(fleet.all("planned")[0]["devices"][0]["ranks"])
    first, second = ({n: r for n, r in found.items() if r} for found in ranks)
    assert (list(first), list(second)) == ([UP], [DOWN])


def test_a_device_that_fails_or_lies_is_left_out_with_its_reason(
    fleet: FakeFleet, play: Play, tree: Any
) -> None:
    del fleet.calibrated["a"]
    fleet.calibrated["b"].spoil = lambda report: replace(report, samples=9)
    play(fleet, tree)
    refused = {one["device"]: one["reason"] for one in fleet.all("calibration_refused")}
    assert refused.keys() == {"a", "b"}
    assert "expected 1..8 samples, got 9" in refused["b"]
    (found,) = fleet.all("importance_found")
    assert found["tokens"] == 80
    assert found["top"] == {DOWN: 0.8, UP: 0.2}
    assert len(fleet.all("device_reported")) == 3


def test_a_device_that_would_drown_the_others_is_left_out(
    fleet: FakeFleet, play: Play, tree: Any
) -> None:
    fleet.calibrated["c"] = Device(fleet, {UP: 1e9, DOWN: 1.0})
    play(fleet, tree)
    (refused,) = fleet.all("calibration_refused")
    assert refused["device"] == "c"
    assert "100 times the fleet's median" in refused["reason"]
    assert fleet.all("importance_found")[0]["top"] == {DOWN: 0.5714, UP: 0.4286}


def test_without_any_answer_the_prior_stands_with_a_warning(
    fleet: FakeFleet, play: Play, tree: Any, tmp_path: Path
) -> None:
    fleet.calibrated.clear()
    play(fleet, tree)
    (warning,) = fleet.all("warning")
    assert warning["text"].startswith("no device could measure sensitivity")
    assert fleet.all("importance_found") == []
    assert not (tmp_path / "importance.json").exists()
    measured = fleet.all("planned")[0]
    tree["importance"]["method"] = "uniform"
    fleet.events.clear()
    play(fleet, tree)
    assert fleet.all("planned")[0] == measured


def test_some_of_the_devices_can_measure_for_all(fleet: FakeFleet, play: Play, tree: Any) -> None:
    tree["importance"]["devices"] = 2
    play(fleet, tree)
    assert len(fleet.all("device_calibrated")) == 2
    assert fleet.all("calibration_refused") == []


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_nobody_is_asked_for_a_method_that_needs_no_data(
    fleet: FakeFleet, play: Play, tree: Any, method: str
) -> None:
    tree["importance"]["method"] = method
    play(fleet, tree)
    assert not any(device.orders for device in fleet.calibrated.values())
    sources = [found["source"] for found in fleet.all("importance_found")]
    assert sources == (["drawn"] if method == "random" else [])


def test_a_report_of_an_earlier_run_is_taken_in_place_of_a_measurement(
    fleet: FakeFleet, play: Play, tree: Any, tmp_path: Path
) -> None:
    play(fleet, tree)
    kept = tmp_path / "kept.json"
    kept.write_bytes((tmp_path / "importance.json").read_bytes())
    fleet.events.clear()
    tree["importance"] = {"method": "spectrum", "file": str(kept)}
    play(fleet, tree)
    assert fleet.all("device_calibrated") == []
    (found,) = fleet.all("importance_found")
    assert (found["source"], found["method"]) == (str(kept), "sensitivity")
    other = json.loads(kept.read_text(encoding="utf-8")) | {"base_digest": "e" * 64}
    kept.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ProtocolError, match="another base model"):
        play(fleet, tree)


def test_steps_are_asked_for_where_clocks_are_real(
    fleet: FakeFleet, play: Play, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["importance"]["method"] = "uniform"
    tree["simulation"] = {"clock": "measured"}
    for name, step in (("a", 0.5), ("b", 0.0)):
        fleet.calibrated[name] = Device(fleet, {}, step)
    del fleet.calibrated["c"]
    seen: list[Any] = []
    factors = Planning._factors

    def watch(self: Planning, steps: Any) -> Any:
        seen.append(steps)
        return factors(self, steps)

    monkeypatch.setattr(Planning, "_factors", watch)
    play(fleet, tree)
    (steps,) = seen
    assert not fleet.all("importance_found")
    assert steps.keys() == {"a"}
    step = steps["a"]
    assert (step.seconds, step.peak_bytes, step.plan.device) == (0.5, 500_000, "a")
    assert fleet.all("leaves_device")[0]["tensors"] == []


def test_measured_steps_calibrate_the_plan_of_their_class(
    fleet_of: FleetOf, play: Play, tree: Any
) -> None:
    def planned(step_seconds: float) -> tuple[Any, list[Any]]:
        fake = fleet_of("a", "b", "c")
        for name in fake.names:
            rates = {
                "matmul_flops_per_s": {"fp32": 1e6},
                "memory_bandwidth_bytes_per_s": 1e9,
            }
            fake.change(name, profile=DeviceProfile(name, "any", 1, 10**9, **rates))
            fake.calibrated[name] = Device(fake, {}, step_seconds)
        play(fake, tree)
        return fake.all("planned")[-1], fake.all("costs_calibrated")

    tree["importance"]["method"] = "uniform"
    tree["plan"] = {"makespan_weight": 0.0}
    uncalibrated, none = planned(0.0)
    tree["simulation"] = {"clock": "measured"}
    asked, nothing = planned(0.0)  # they measure no step
    assert none == nothing == []
    assert asked["makespan_seconds"] == uncalibrated["makespan_seconds"]
    steps = uncalibrated["devices"][0]["local_steps"]
    measured = 3 * uncalibrated["makespan_seconds"] / steps
    calibrated, (told,) = planned(measured)
    assert told["classes"]["any"]["seconds_factor"] == pytest.approx(3, rel=0.05)
    assert calibrated["makespan_seconds"] == pytest.approx(
        3 * uncalibrated["makespan_seconds"], rel=0.05
    )
