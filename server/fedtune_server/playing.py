"""One run, from its folder's lock to the word of how it ended; simulated or on real machines.

What differs between the two is who calls the coordinator with which grid: `rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from fedtune.errors import FedtuneError, RunError, StoppedError
from fedtune.records import Event, ModelShapes
from fedtune.settings import RunConfig
from fedtune.wire.checkpoint import latest_checkpoint
from fedtune.wire.durable import writing
from fedtune.wire.file_digests import checkpoint_saved
from fedtune_server.clock import Clock
from fedtune_server.coordinator import Coordinator, installed_versions
from fedtune_server.distortion import Measure
from fedtune_server.ledger import Ledger, last_saved, training_ended
from fedtune_server.metrics import MetricsWriter
from fedtune_server.run_folder import RunFolder
from fedtune_server.run_folder import RunState as State
from fedtune_server.saved_state import Saved, find_state

Watcher = Callable[[Event], None]


def play_run(
    config: RunConfig,
    shapes: ModelShapes,
    devices: int,
    *,
    rounds: Callable[[Coordinator], object],
    watch: Watcher,
    finish: Callable[[Path, Watcher], None],
    overwrite: bool = False,
    warnings: Sequence[str] = (),
    measure: Measure | None = None,
    patience: float = 1.0,
    clock: Clock | None = None,
) -> Path:
    """Play a run, or what is left of it, and return its folder.

    Args:
        devices: that take part, as far as that is known.
        rounds: lets the coordinator play on a grid.
        watch: told of every event, beside the ledger and the metrics.
        finish: called with the run folder after the last round, to write the exports; its events
            are the run's.
        overwrite: replace a run that the folder already holds, instead of going on with it.
        warnings: to record at the start of the run.
        measure, patience, clock: as for `Coordinator`.

    Raises:
        FedtuneError: as the coordinator or `finish` raised it; the folder says so, as it does
            after a fault of ours.
        KeyboardInterrupt, SystemExit, StoppedError: it was interrupted, and the folder says so.
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

        coordinator = Coordinator(config, shapes, folder, emit, patience, measure, clock, saved)
        try:
            if saved is not None:
                _announce(saved, config, folder, devices, emit)
            for warning in (*folder.notes, *warnings):
                emit(Event("warning", {"text": warning}))
            if not ended:
                rounds(coordinator)
            with writing(folder.exports):
                finish(folder.path, emit)
            folder.write_ending("finished")
        except (KeyboardInterrupt, SystemExit, StoppedError):
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
