"""What a run does with its base model at hand: measure it, and write the exports at the end.

It needs torch, which a coordinator of real sites may do without: `fedtune export` then writes the
exports later, on a machine that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from fedtune.config import cache_folder
from fedtune.data.sites import read_test_rows
from fedtune.records import DistortionTable, Event, MatrixForm, ModelShapes
from fedtune.settings import RunConfig
from fedtune.wire.file_digests import export_digests

_NEEDED = ("torch", "transformers")
"""Packages of the extra `train` that all exports but the report need."""


def can_compute() -> bool:
    """Whether this machine has what measuring and exporting need."""
    return all(find_spec(package) is not None for package in _NEEDED)


def measure_base(
    model: Path, shapes: ModelShapes, forms: Sequence[MatrixForm], emit: Callable[[Event], None]
) -> DistortionTable:
    """What each matrix of the base loses in each form; tells of its progress by events."""
    from fedtune.importance.distortion import base_distortion

    def progress(done: int, of: int) -> None:
        emit(Event("distortion_progress", {"matrices": done, "of": of}))

    return base_distortion(model, shapes, forms, cache_folder() / "distortion", progress)


def finish_run(config: RunConfig, folder: Path, emit: Callable[[Event], None]) -> None:
    """Write the exports, measure the merged model on the test file, and write the report.

    The report comes last, because it tells of all the rest.
    """
    from fedtune.export.run_export import export_run

    report = export_run(folder, config.outputs.exports)
    test_rows = read_test_rows(config.data)
    if test_rows and "merged" in report.paths:
        from fedtune.evaluate.compare import compare_on_rows

        emit(compare_on_rows(config, Path(report.paths["merged"]), test_rows, folder))
    # The report has no digest here: it is written after this event, which it tells of.
    digests = export_digests(folder, report.paths.values())
    paths = {**report.paths, "report": str(folder / "report.html")}
    skipped = dict(report.skipped)
    emit(Event("exported", {"paths": paths, "skipped": skipped, "digests": digests}))
    export_run(folder, ["report"])


def finish_deployed_run(config: RunConfig, folder: Path, emit: Callable[[Event], None]) -> None:
    """As `finish_run`, without what this machine cannot do: a warning then says how to do it."""
    wanted = config.outputs.exports
    if wanted and not can_compute():
        text = (
            f"this machine cannot write {', '.join(wanted)}; pip install 'fedtune[train]' here or "
            "on a machine that has the base and this folder, then: fedtune export RUN"
        )
        emit(Event("warning", {"text": text}))
        outputs = config.outputs.model_copy(update={"exports": ()})
        config = config.model_copy(update={"outputs": outputs})
    finish_run(config, folder, emit)
