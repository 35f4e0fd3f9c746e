"""The plan of a run's fleet: measured, solved or read from a file, written down, and told.

    ask the devices what matters and what a step costs -> plan -> plan.json, `planned`

A `Planning` keeps everything that the first plan was made with, so that a device that is planned
anew between rounds is planned with the same knowledge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from fedtune.aggregate.directions import TailUse
from fedtune.coding import coded_bytes
from fedtune.errors import RunError
from fedtune.plan.calibration import StepMeasurement
from fedtune.plan.calibration import calibrate as class_factors
from fedtune.plan.describe import plan_rows
from fedtune.plan.edited import follow_plan, unknown_devices
from fedtune.plan.from_config import plan_pins, plan_settings
from fedtune.plan.mixing import may_mix
from fedtune.plan.plan_file import plan_file
from fedtune.plan.predict import predict
from fedtune.plan.settings import PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.plan.written import read_plan
from fedtune.records import (
    CostCalibration,
    DevicePlan,
    DeviceProfile,
    Event,
    FleetPlan,
    FloatArray,
    ModelShapes,
    SiteReport,
)
from fedtune.settings import RunConfig
from fedtune.wire.distortion import read_distortion
from fedtune.wire.importance import read_importance
from fedtune.wire.tensors import update_shapes
from fedtune_server.distortion import Measure, find_distortion
from fedtune_server.fleet import Emit, Fleet, choose_devices
from fedtune_server.importance import (
    Calibration,
    CalibrationTerms,
    MeasuredStep,
    calibrate,
    find_calibration,
)
from fedtune_server.presence import Again
from fedtune_server.run_folder import RunFolder
from fedtune_server.state import Known

_IMPORTANCE, _DISTORTION = "importance.json", "distortion.json"


class Planning:
    """Plans one run's fleet, and keeps what it was planned with.

    Args:
        fleet: the devices that take part.
        tail: what the aggregation rule sends beside the trained directions.
        measure: called for the distortion table if a plan can use one and the config names none;
            None where the base is not at hand.
    """

    def __init__(
        self,
        config: RunConfig,
        shapes: ModelShapes,
        fleet: Fleet,
        tail: TailUse,
        folder: RunFolder,
        emit: Emit,
        measure: Measure | None,
    ) -> None:
        self._config, self._shapes, self._fleet = config, shapes, fleet
        self._folder, self._emit, self._measure = folder, emit, measure
        self._profiles = [report.profile for report in fleet.reports.values()]
        dense_parameters = sum(int(np.prod(shape)) for shape in fleet.dense_shapes.values())
        self._settings = plan_settings(config, dense_parameters, tail, shapes.matrices)
        self._listed_bytes = 0
        self._calibration: Mapping[str, CostCalibration] = {}
        self._made_with: list[str] = []
        held = {name: report.train_samples for name, report in fleet.reports.items()}
        # All that a fleet is planned with goes in here: whoever plans anew calls the same.
        self._plan_fleet: Callable[..., FleetPlan] = partial(
            plan_fleet,
            shapes=shapes,
            settings=self._settings,
            pins=plan_pins(config),
            samples=None if config.aggregate.weights == "uniform" else held,
        )

    @property
    def again(self) -> Callable[..., FleetPlan]:
        """Plans profiles that may have changed, with all that the first plan was made with."""
        return self._plan_fleet

    def measure(
        self,
        grid: Grid,
        run: str,
        heads: Mapping[str, FloatArray],
        deadline_s: float,
        again: Again | None = None,
    ) -> None:
        """Let the devices say which weights matter and what a step costs, where that is wanted.

        Args:
            heads: values of the parameters that are trained whole.
            again: how devices that come and go are asked again; default: they stay.
        """
        config = self._config
        if config.plan.file:
            return
        chosen = choose_devices(self._fleet.names, config.importance.devices, config.run.seed, 0)

        def ask(terms: CalibrationTerms) -> Calibration:
            first = self._plan_fleet(self._profiles).by_device()
            plans = [first[name] for name in chosen]
            return calibrate(grid, self._fleet, plans, terms, self._emit, again)

        ranks = (pins.rank_max for pins in plan_pins(config).values())
        terms = CalibrationTerms(
            run=run,
            shapes=self._shapes,
            rank=max([self._settings.rank_max, *ranks]),
            batches=config.importance.batches,
            seed=config.run.seed,
            deadline_s=deadline_s,
            heads=heads,
        )
        real = config.simulation.clock == "measured"
        found = find_calibration(config.importance, terms, ask, real, self._folder, self._emit)
        factors = self._factors(found.steps)
        if factors:
            self._emit(Event("costs_calibrated", {"classes": _shown(factors)}))
        self._calibration = factors
        if found.importance is not None:
            self._made_with.append(_IMPORTANCE)
        self._plan_fleet = partial(
            self._plan_fleet, importance=found.importance, calibration=factors
        )

    def admit(self, reports: Mapping[str, SiteReport]) -> None:
        """Know of these devices from now on.

        Args:
            reports: of all devices of the run, in the order of their names.
        """
        self._fleet = replace(self._fleet, reports=reports)
        self._profiles = [report.profile for report in reports.values()]
        if self._config.aggregate.weights != "uniform":
            held = {name: report.train_samples for name, report in reports.items()}
            self._plan_fleet = partial(self._plan_fleet, samples=held)

    def write(self, plan: FleetPlan) -> list[dict[str, object]]:
        """Make `plan.json` that of these plans, and tell of it; its rows, in their order."""
        written = plan_file(
            plan, self._profiles, self._shapes, self._settings, self._config.run.name
        )
        self._folder.write_json("plan.json", written)
        rows = plan_rows(plan, self._profiles, self._shapes)
        makespan = max(device.seconds for device in plan.devices)
        self._emit(Event("planned", {"devices": rows, "makespan_seconds": makespan}))
        return rows

    @property
    def known(self) -> Known:
        """What the plan was made with, to go on from with `go_on`."""
        return Known(
            reports=self._fleet.reports,
            calibration=self._calibration,
            digests={name: _digest(self._folder.path / name) for name in self._made_with},
        )

    def go_on(self, known: Known, plans: Collection[DevicePlan]) -> None:
        """Take the place of a planning that made these plans.

        Raises:
            RunError: a file of the run folder that it was made with is gone or another.
        """
        for name, digest in known.digests.items():
            path = self._folder.path / name
            if not path.exists() or _digest(path) != digest:
                raise RunError(
                    f"{path} is not the one that the run was planned with; put it back, or start "
                    "anew with --overwrite"
                )
        self._calibration, self._made_with = known.calibration, list(known.digests)
        found: dict[str, object] = {"calibration": known.calibration}
        if _IMPORTANCE in known.digests:
            path = self._folder.path / _IMPORTANCE
            found["importance"] = read_importance(path, self._shapes.digest)
        if _DISTORTION in known.digests:
            found["distortion"] = read_distortion(self._folder.path / _DISTORTION)
        self._plan_fleet = partial(self._plan_fleet, **found)
        self._listed_bytes = max(plan.upload_bytes for plan in plans)

    def plan(self) -> FleetPlan:
        """The fleet's plan; `plan.json` then holds it, and its events are told.

        Raises:
            PlanError: a device cannot carry any plan, or the written plan cannot be followed.
        """
        plan = self._followed() if self._config.plan.file else self._solved()
        self.write(plan)
        self.say_what_leaves(plan.devices)
        return plan

    def say_what_leaves(self, plans: Collection[DevicePlan]) -> None:
        """List what a device of the largest plan sends back in a round, if that is news."""
        largest = max(plans, key=lambda device: device.upload_bytes)
        if largest.upload_bytes <= self._listed_bytes:
            return
        self._listed_bytes = largest.upload_bytes
        shapes = update_shapes(largest, self._shapes.by_name(), self._fleet.dense_shapes)
        tensors = [
            {
                "name": name,
                "shape": list(shape),
                "bytes": coded_bytes(self._config.wire.up, shape),
            }
            for name, shape in sorted(shapes.items())
        ]
        self._emit(Event("leaves_device", {"stage": "round", "tensors": tensors}))

    def _followed(self) -> FleetPlan:
        """The plan that the run file names; devices of it that did not come are only told of."""
        written = read_plan(Path(self._config.plan.file))
        absent = unknown_devices(written, [profile.name for profile in self._profiles])
        if absent:
            self._emit(Event("warning", {"text": absent}))
        pins = plan_pins(self._config)
        return follow_plan(written, self._profiles, self._shapes, self._settings, pins)

    def _solved(self) -> FleetPlan:
        """The plan; made anew with a distortion table if that can improve it."""
        plan = self._plan_fleet(self._profiles)
        if self._config.plan.widths == "uniform" or not may_mix(plan):
            return plan
        table = find_distortion(
            self._config.plan, self._profiles, self._measure, self._folder, self._emit
        )
        if table is None:
            return plan
        self._made_with.append(_DISTORTION)
        self._plan_fleet = partial(self._plan_fleet, distortion=table)
        return self._plan_fleet(self._profiles)

    def _factors(self, steps: Mapping[str, MeasuredStep]) -> dict[str, CostCalibration]:
        """Device class -> what its devices' measured steps say of the closed form."""
        found: dict[str, list[StepMeasurement]] = {}
        for profile in self._profiles:
            step = steps.get(profile.name)
            if step is not None:
                beside = _beside(step, profile, self._shapes, self._settings)
                found.setdefault(profile.device_class, []).append(beside)
        return class_factors(found)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _beside(
    step: MeasuredStep, profile: DeviceProfile, shapes: ModelShapes, settings: PlanSettings
) -> StepMeasurement:
    """A measured step beside what is predicted of it."""
    predicted = predict(step.plan, profile, shapes, settings)
    return StepMeasurement(
        seconds=step.seconds,
        predicted_seconds=predicted.compute_seconds / step.plan.local_steps,
        peak_bytes=step.peak_bytes,
        predicted_bytes=predicted.peak_bytes,
    )


def _shown(factors: Mapping[str, CostCalibration]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "seconds_factor": round(factor.seconds_factor, 3),
            "bytes_factor": round(factor.bytes_factor, 3),
        }
        for name, factor in sorted(factors.items())
    }
