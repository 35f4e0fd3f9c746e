"""A whole run on one machine: the same ServerApp and ClientApp as in a deployment.

`simulate` opens the run folder, lets the coordinator play the run on the chosen backend, and
leaves a folder that says how it ended, whatever happened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.records import ModelShapes
from fedtune.settings import RunConfig
from fedtune_server.app import make_server_app
from fedtune_server.clock import VirtualClock
from fedtune_server.coordinator import Coordinator
from fedtune_server.distortion import Measure
from fedtune_server.playing import Watcher, play_run
from fedtune_server.roster import Counted
from fedtune_server.simulation.delayed import DelayedGrid
from fedtune_server.simulation.delays import delays
from fedtune_server.simulation.grid import InProcessGrid, Together, run_inprocess
from fedtune_server.simulation.ray import run_ray


def simulate(
    config: RunConfig,
    client_app: ClientApp,
    shapes: ModelShapes,
    devices: int,
    *,
    watch: Watcher,
    finish: Callable[[Path, Watcher], None],
    overwrite: bool = False,
    warnings: Sequence[str] = (),
    measure: Measure | None = None,
    together: Together | None = None,
) -> Path:
    """Play a run, or what is left of it, and return its folder.

    A folder that holds this run, unfinished, is where it goes on: after its newest round that was
    saved, or with its exports if only they are missing.

    Args:
        client_app: what every simulated device runs.
        devices: sites that take part; each is one device.
        watch: told of every event, beside the ledger and the metrics.
        finish: called with the run folder after the last round, to write the exports; its events
            are the run's.
        overwrite: replace a run that the folder already holds, instead of going on with it.
        warnings: to record at the start of the run.
        measure: measures the base's distortion table, if the plan can use one.
        together: lets devices of the in-process backend work in one pass.

    Raises:
        FedtuneError: as the coordinator or `finish` raised it; the folder says so, as it does
            after a fault of ours.
        KeyboardInterrupt: on Ctrl-C, after the folder says so.
    """
    clock = VirtualClock() if config.simulation.delay != "none" else None
    return play_run(
        config,
        shapes,
        devices,
        rounds=lambda coordinator: _play(config, coordinator, client_app, devices, together, clock),
        watch=watch,
        finish=finish,
        overwrite=overwrite,
        warnings=warnings,
        measure=measure,
        patience=_patience(config, devices),
        clock=clock,
    )


def _play(
    config: RunConfig,
    coordinator: Coordinator,
    client_app: ClientApp,
    devices: int,
    together: Together | None,
    clock: VirtualClock | None,
) -> None:
    def job(grid: Grid) -> None:
        coordinator.run(grid, Counted(devices))

    server_app = make_server_app(job)
    settings = config.simulation
    if settings.backend == "ray":
        threads = settings.threads or os.cpu_count() or 1
        run_ray(
            server_app,
            client_app,
            devices,
            threads=threads,
            workers=settings.workers,
            accelerators_per_device=_gpu_share(config),
        )
    else:
        run_inprocess(
            server_app,
            client_app,
            devices,
            workers=1,
            together=together,
            make=InProcessGrid if clock is None else _delayed(config, clock),
        )


def _delayed(config: RunConfig, clock: VirtualClock) -> Callable[..., InProcessGrid]:
    settings = config.simulation
    assert settings.delay != "none"
    delay = delays(settings.delay, settings.delay_spread, config.run.seed)
    return partial(DelayedGrid, delay=delay, clock=clock)


def _gpu_share(config: RunConfig) -> float:
    """What Ray sets aside of one GPU for each device that trains at the same time."""
    settings = config.simulation
    return 0.0 if settings.accelerator == "cpu" else 1.0 / settings.workers


def _patience(config: RunConfig, devices: int) -> float:
    """Devices take turns here, so a round lasts as long as all turns together."""
    workers = config.simulation.workers if config.simulation.backend == "ray" else 1
    return float(math.ceil(devices / workers))
