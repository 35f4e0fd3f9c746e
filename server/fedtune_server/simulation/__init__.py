"""A whole run on one machine: the same ServerApp and ClientApp as in a deployment.

`simulate` opens the run folder, lets the coordinator play the run on the chosen backend, and
leaves a folder that says how it ended, whatever happened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.errors import FedtuneError, RunError
from fedtune.records import Event, ModelShapes
from fedtune.settings import RunConfig
from fedtune.wire.checkpoint import latest_checkpoint
from fedtune.wire.durable import writing
from fedtune.wire.file_digests import checkpoint_saved
from fedtune_server.app import make_server_app
from fedtune_server.clock import VirtualClock
from fedtune_server.coordinator import Coordinator, installed_versions
from fedtune_server.distortion import Measure
from fedtune_server.ledger import Ledger, last_saved, training_ended
from fedtune_server.metrics import MetricsWriter
from fedtune_server.run_folder import RunFolder
from fedtune_server.run_folder import RunState as State
from fedtune_server.saved_state import Saved, find_state
from fedtune_server.simulation.delayed import DelayedGrid
from fedtune_server.simulation.delays import delays
from fedtune_server.simulation.grid import InProcessGrid, Together, run_inprocess
from fedtune_server.simulation.ray import run_ray

Watcher = Callable[[Event], None]


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
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.enter(config.folder, config, overwrite=overwrite))
        saved = find_state(folder.checkpoints, shapes.digest, folder.run)
        ended = saved is not None and _ended(saved, config, folder)
        after = saved.state.round if saved is not None else None
        ledger = stack.enter_context(Ledger(folder.ledger))
        metrics = stack.enter_context(MetricsWriter(folder.metrics, folder.tensorboard, after))

        def emit(event: Event) -> None:
            ledger.append(event)
            metrics(event)
            watch(event)

        clock = VirtualClock() if config.simulation.delay != "none" else None
        patience = _patience(config, devices)
        coordinator = Coordinator(config, shapes, folder, emit, patience, measure, clock, saved)
        try:
            if saved is not None:
                _announce(saved, config, folder, devices, emit)
            for warning in (*folder.notes, *warnings):
                emit(Event("warning", {"text": warning}))
            if not ended:
                _play(config, coordinator, client_app, devices, together, clock)
            with writing(folder.exports):
                finish(folder.path, emit)
            folder.write_ending("finished")
        except KeyboardInterrupt:
            _end(folder, "interrupted", Event("run_interrupted", {"round": folder.reached}), emit)
            raise
        except BaseException as error:
            named = str(error) if isinstance(error, FedtuneError) else repr(error)
            _end(folder, "failed", Event("run_failed", {"reason": named}), emit)
            raise
    return config.folder


def _ended(saved: Saved, config: RunConfig, folder: RunFolder) -> bool:
    """Whether only the exports are left to do."""
    return saved.state.round >= config.run.rounds and training_ended(folder.ledger)


def _announce(
    saved: Saved, config: RunConfig, folder: RunFolder, devices: int, emit: Watcher
) -> None:
    """Say from where a run goes on, and which checkpoints were no good."""
    for reason in saved.skipped:
        text = f"{reason}; it is kept under a name that ends in .damaged, and the one before used"
        emit(Event("warning", {"text": text}))
    emit(
        Event(
            "run_resumed",
            {
                "run": folder.run,
                "folder": str(folder.path),
                "round": saved.state.round,
                "rounds": config.run.rounds,
                "devices": devices,
                "skipped": len(saved.skipped),
                "versions": installed_versions(),
            },
        )
    )
    newest = latest_checkpoint(folder.checkpoints)
    if newest is not None and last_saved(folder.ledger) < saved.state.round:
        emit(checkpoint_saved(newest, saved.state.round))  # a killed process had no time to say it


def _end(folder: RunFolder, state: State, event: Event, emit: Watcher) -> None:
    """Leave word of how the run ended; where the disk takes none, what ended it is said anyway."""
    with suppress(RunError):
        folder.write_ending(state)
    with suppress(RunError):
        emit(event)


def _play(
    config: RunConfig,
    coordinator: Coordinator,
    client_app: ClientApp,
    devices: int,
    together: Together | None,
    clock: VirtualClock | None,
) -> None:
    def job(grid: Grid) -> None:
        coordinator.run(grid, devices)

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
