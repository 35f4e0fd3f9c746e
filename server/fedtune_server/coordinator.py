"""The whole job of a coordinator, from the first question to the last checkpoint.

    gather the fleet -> plan it -> rounds of (dispatch, train, check, join, checkpoint) -> measure

`Coordinator.run` reads like that line. It needs no torch and never loads the base: shapes come
from the model folder's headers. Everything that happens is emitted as an event; the ledger, the
metrics and a display are listeners.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from flwr.serverapp import Grid

from fedtune.aggregate.rules import make_rule
from fedtune.aggregate.server_step import apply_server_step
from fedtune.plan.describe import plan_rows
from fedtune.plan.from_config import plan_pins, plan_settings
from fedtune.plan.mixing import may_mix
from fedtune.plan.settings import Pins, PlanSettings
from fedtune.plan.solve import plan_fleet
from fedtune.records import (
    DeviceProfile,
    Event,
    FleetPlan,
    FloatArray,
    GlobalAdapter,
    ImportanceReport,
    LoraScale,
    ModelShapes,
    TrainingWay,
)
from fedtune.settings import RunConfig
from fedtune.wire.checkpoint import prune_checkpoints, write_checkpoint
from fedtune.wire.messages import OptimizerSpec, TaskSpec
from fedtune.wire.tensors import update_shapes
from fedtune_server import round as rounds
from fedtune_server.distortion import Measure, find_distortion
from fedtune_server.fleet import Emit, Fleet, choose_devices, gather_fleet, wait_for_nodes
from fedtune_server.importance import (
    Calibration,
    CalibrationTerms,
    calibrate,
    find_calibration,
)
from fedtune_server.run_folder import RunFolder
from fedtune_server.schedule import learning_rate

_HEAD_STD = 0.02
"""Standard deviation of a fresh task head; the initialiser range of BERT and Llama."""

_REPORTED_PACKAGES = ("fedtune", "flwr", "numpy", "torch", "transformers", "bitsandbytes")


class Coordinator:
    """Plays one run on a grid.

    Args:
        config: the run's settings; the parts below this class get plain values.
        shapes: of the base model.
        folder: where the run is kept.
        emit: told of every event.
        patience: how many times `run.round_deadline_s` a round may take; above 1 where devices
            devices take turns on one machine.
        measure: called for the distortion table if a plan can use one and the config names none;
            None where the base is not at hand.
    """

    def __init__(
        self,
        config: RunConfig,
        shapes: ModelShapes,
        folder: RunFolder,
        emit: Emit,
        patience: float = 1.0,
        measure: Measure | None = None,
    ) -> None:
        self._config, self._shapes, self._folder, self._emit = config, shapes, folder, emit
        self._measure = measure
        self._run_id = f"{config.run.name}-{os.urandom(4).hex()}"
        self._rule = make_rule(config.aggregate.rule, config.lora.rank_cap, seed=config.run.seed)
        self._terms = rounds.RoundTerms(
            run=self._run_id,
            base_digest=shapes.digest,
            shapes=shapes.by_name(),
            scale=LoraScale(config.lora.scale, config.lora.scaling),
            wire_dtype=config.wire.dtype,
            weights=config.aggregate.weights,
            minimum_devices=config.run.minimum_devices,
            deadline_s=config.run.round_deadline_s * patience,
            seed=config.run.seed,
        )

    def run(self, grid: Grid, devices: int) -> GlobalAdapter:
        """Play the run to its end.

        Raises:
            RoundError: too few devices came, or too few of a round's updates were good.
            PlanError: a device cannot carry any plan.
            RunError: no device can take part.
        """
        started = time.perf_counter()
        self._announce(devices)
        fleet = self._gather(grid, devices)
        calibration = self._calibrate(grid, fleet)
        plan = self._plan(fleet, calibration)
        adapter = self._rule.start(self._shapes.matrices, self._fresh_heads(fleet))
        adapter, before = self._rounds(grid, fleet, plan, adapter)
        after = rounds.evaluate(
            grid, fleet, self._rule, adapter, plan.devices, self._terms, self._emit
        )
        fields = {
            "seconds": time.perf_counter() - started,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
        }
        self._emit(Event("run_finished", fields))
        return adapter

    def _announce(self, devices: int) -> None:
        config = self._config
        self._emit(
            Event(
                "run_started",
                {
                    "run": self._run_id,
                    "folder": str(self._folder.path),
                    "rounds": config.run.rounds,
                    "devices": devices,
                    "rule": config.aggregate.rule,
                    "seed": config.run.seed,
                    "versions": installed_versions(),
                },
            )
        )

    def _gather(self, grid: Grid, devices: int) -> Fleet:
        task = TaskSpec(
            run=self._run_id,
            task=self._config.model.task,
            base_digest=self._shapes.digest,
            matrices=tuple(matrix.name for matrix in self._shapes.matrices),
            seed=self._config.run.seed,
        )
        nodes = wait_for_nodes(grid, devices, self._terms.deadline_s)
        fleet = gather_fleet(grid, nodes, task, self._terms.deadline_s, self._emit)
        if fleet.labels:
            self._folder.write_json("labels.json", list(fleet.labels))
        return fleet

    def _calibrate(self, grid: Grid, fleet: Fleet) -> Calibration:
        """What matters and what steps cost, as far as the run file wants it measured."""
        config = self._config
        if config.plan.file:
            return Calibration()
        settings, pins = self._plan_settings(fleet), plan_pins(config)
        profiles = [report.profile for report in fleet.reports.values()]
        chosen = choose_devices(fleet.names, config.importance.devices, config.run.seed, 0)

        def ask(terms: CalibrationTerms) -> Calibration:
            first = plan_fleet(profiles, self._shapes, settings, pins=pins).by_device()
            return calibrate(grid, fleet, [first[name] for name in chosen], terms, self._emit)

        terms = CalibrationTerms(
            run=self._run_id,
            shapes=self._shapes,
            rank=max([settings.rank_max, *(p.rank_max for p in pins.values())]),
            batches=config.importance.batches,
            seed=config.run.seed,
            deadline_s=self._terms.deadline_s,
            heads=self._fresh_heads(fleet),
        )
        real = config.simulation.clock == "measured"
        return find_calibration(config.importance, terms, ask, real, self._folder, self._emit)

    def _plan_settings(self, fleet: Fleet) -> PlanSettings:
        dense_parameters = sum(int(np.prod(shape)) for shape in fleet.dense_shapes.values())
        return plan_settings(self._config, dense_parameters, self._rule.tail)

    def _plan(self, fleet: Fleet, calibration: Calibration) -> FleetPlan:
        # `calibration.steps` holds each device's measured step, for a calibrated cost model.
        profiles = [report.profile for report in fleet.reports.values()]
        settings, pins = self._plan_settings(fleet), plan_pins(self._config)
        plan = self._solve(profiles, settings, pins, calibration.importance)
        rows = plan_rows(plan, profiles, self._shapes)
        self._folder.write_json("plan.json", rows)
        self._emit(Event("planned", {"devices": rows}))
        tensors = self._what_leaves(plan, fleet)
        self._emit(Event("leaves_device", {"stage": "round", "tensors": tensors}))
        return plan

    def _solve(
        self,
        profiles: Sequence[DeviceProfile],
        settings: PlanSettings,
        pins: Mapping[str, Pins],
        importance: ImportanceReport | None,
    ) -> FleetPlan:
        """The plan; made anew with a distortion table if that can improve it."""
        plan = plan_fleet(profiles, self._shapes, settings, importance, pins)
        if self._config.plan.widths == "uniform" or not may_mix(plan):
            return plan
        table = find_distortion(
            self._config.plan, profiles, self._measure, self._folder, self._emit
        )
        if table is None:
            return plan
        return plan_fleet(profiles, self._shapes, settings, importance, pins, table)

    def _what_leaves(self, plan: FleetPlan, fleet: Fleet) -> list[dict[str, object]]:
        """Every tensor that a device of the largest plan sends back in a round."""
        largest = max(plan.devices, key=lambda device: device.upload_bytes)
        shapes = update_shapes(largest, self._terms.shapes, fleet.dense_shapes)
        return [
            {"name": name, "shape": list(shape), "bytes": 4 * int(np.prod(shape))}
            for name, shape in sorted(shapes.items())
        ]

    def _fresh_heads(self, fleet: Fleet) -> dict[str, FloatArray]:
        """Seeded values for the parameters that the base does not have."""
        rng = np.random.default_rng([self._config.run.seed, 2])
        heads: dict[str, FloatArray] = {}
        for name, shape in sorted(fleet.dense_shapes.items()):
            values = rng.normal(0.0, _HEAD_STD, shape) if len(shape) > 1 else np.zeros(shape)
            heads[name] = values.astype(np.float32)
        return heads

    def _rounds(
        self, grid: Grid, fleet: Fleet, plan: FleetPlan, adapter: GlobalAdapter
    ) -> tuple[GlobalAdapter, float | None]:
        """Play all rounds; also returns the held-out loss before the first."""
        config, by_device = self._config, plan.by_device()
        momentum: GlobalAdapter | None = None
        before: float | None = None
        for number in range(1, config.run.rounds + 1):
            self._folder.write_status("running", number - 1)
            chosen = choose_devices(
                fleet.names, config.run.devices_per_round, config.run.seed, number
            )
            joined, held_out = rounds.train(
                grid,
                fleet,
                self._rule,
                adapter,
                [by_device[name] for name in chosen],
                self._optimizer(number),
                self._terms,
                number,
                evaluate=self._measures(number),
                emit=self._emit,
            )
            before = held_out if number == 1 else before
            adapter, momentum = apply_server_step(
                adapter,
                joined,
                momentum,
                step=config.aggregate.server_step,
                beta=config.aggregate.momentum,
                rank_cap=config.lora.rank_cap,
            )
            self._checkpoint(adapter, momentum)
        return adapter, before

    def _measures(self, number: int) -> bool:
        every = self._config.train.evaluate_every
        return every > 0 and (number - 1) % every == 0

    def _optimizer(self, number: int) -> OptimizerSpec:
        train = self._config.train
        rounds_total = self._config.run.rounds

        def rate(progress: float) -> float:
            share = train.final_learning_rate_share
            return learning_rate(train.learning_rate, share, progress, train.schedule)

        return OptimizerSpec(
            name=train.optimizer,
            learning_rate=rate((number - 1) / rounds_total),
            final_learning_rate=rate(number / rounds_total),
            weight_decay=train.weight_decay,
            beta1=train.beta1,
            beta2=train.beta2,
            max_gradient_norm=train.max_gradient_norm,
            keep=train.keep_optimizer,
            way=TrainingWay(
                name=train.way,
                start=self._config.lora.start,
                layer_rate_decay=train.layer_rate_decay,
                flops_share=train.flops_share,
                allora_eta=train.allora_eta,
                channels=train.channels,
                seed=self._config.run.seed,
            ),
        )

    def _checkpoint(self, adapter: GlobalAdapter, momentum: GlobalAdapter | None) -> None:
        extra = {} if momentum is None else {"momentum": momentum}
        meta = {"base_digest": self._shapes.digest}
        write_checkpoint(self._folder.checkpoints, adapter, extra, meta)
        prune_checkpoints(self._folder.checkpoints, self._config.outputs.keep_checkpoints)


def installed_versions() -> Mapping[str, str]:
    """Versions of the packages that decide a run's numbers, where they are installed."""
    found = {}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
