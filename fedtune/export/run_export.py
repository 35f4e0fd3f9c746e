"""All exports of a run folder: from its latest checkpoint and its base model to usable files.

Each export is written under a temporary name in `exports/` and renamed when complete, so what has
its final name is whole. The parts that need torch are imported when they are asked for: the
report needs none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedtune.config import load_run_config
from fedtune.errors import ConfigError, MissingExtraError, ModelError, RunError
from fedtune.export.report import write_report
from fedtune.model.source import base_digest, resolve_model
from fedtune.records import ExportReport, GlobalAdapter, TaskName
from fedtune.wire.checkpoint import latest_checkpoint, read_checkpoint

EXPORT_FORMATS = ("merged", "peft", "onnx", "report")


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What every export starts from.

    Attributes:
        base_name: what the run file calls the base; a hub id or a folder.
    """

    base: Path
    base_name: str
    revision: str
    adapter: GlobalAdapter
    task: TaskName
    labels: tuple[str, ...]


def export_run(folder: Path, formats: Sequence[str], base: str = "") -> ExportReport:
    """Write the named exports of a run into its folder, from its latest checkpoint.

    Args:
        folder: run folder.
        formats: of `merged`, `peft`, `onnx`, `report`.
        base: base model to use instead of the run file's, such as its place on another machine;
            it must be the same model.

    Returns:
        Paths by format; what could not be written for a reason that leaves the others usable is
        in `skipped`.

    Raises:
        ConfigError: an unknown format, or the folder's config.json is wrong.
        RunError: there is no usable checkpoint, or the base is not the one that was trained on.
        ModelError: the base cannot be loaded, or the adapter does not fit it.
        MissingExtraError: torch or transformers is not installed.
    """
    unknown = [name for name in formats if name not in EXPORT_FORMATS]
    if unknown:
        raise ConfigError(f"unknown export {unknown[0]!r}; valid: {', '.join(EXPORT_FORMATS)}")
    paths: dict[str, str] = {}
    skipped: dict[str, str] = {}
    if set(formats) - {"report"}:
        source = export_source(folder, base)
        exports = folder / "exports"
        _clear_leftovers(exports)
        if "merged" in formats or "onnx" in formats:
            merged = _write_merged(source, exports, keep="merged" in formats)
        if "merged" in formats:
            paths["merged"] = str(merged)
        if "peft" in formats:
            paths["peft"] = str(_publish(exports / "peft", partial(write_peft_folder, source)))
        if "onnx" in formats:
            try:
                paths["onnx"] = str(_write_onnx(source, merged, exports))
            except (ModelError, MissingExtraError) as error:
                skipped["onnx"] = str(error)
        _clear_leftovers(exports)
    if "report" in formats:
        paths["report"] = str(write_report(folder))
    return ExportReport(paths, skipped)


def export_source(folder: Path, base: str = "") -> ExportSource:
    """Read the run's facts and its latest checkpoint, and prove that the base is the right one.

    Raises:
        ConfigError: the folder's config.json is wrong.
        RunError: there is no usable checkpoint, or the base is not the one that was trained on.
        ModelError: the base cannot be found.
    """
    config = load_run_config(folder / "config.json")
    path = latest_checkpoint(folder / "checkpoints")
    checkpoint = read_checkpoint(path) if path is not None else None
    if checkpoint is None or checkpoint.adapter.round == 0:
        raise RunError(
            f"{folder} has no checkpoint to export; let at least one round of the run finish"
        )
    base_name = base or config.model.path
    base_folder = resolve_model(base_name, config.model.revision)
    expected, found = checkpoint.meta.get("base_digest", ""), base_digest(base_folder)
    if expected != found:
        raise RunError(
            f"base model {base_folder} has digest {found[:12]}, the run was trained on "
            f"{expected[:12] or 'an unknown base'}; name the same model with --base"
        )
    labels = _labels(folder, config.model.task)
    return ExportSource(
        base_folder,
        base_name,
        "" if Path(base_name).exists() else config.model.revision,
        checkpoint.adapter,
        config.model.task,
        labels,
    )


def _labels(folder: Path, task: TaskName) -> tuple[str, ...]:
    """Class names of the run, in the order of their indices."""
    if task == "causal-lm":
        return ()
    path = folder / "labels.json"
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{path} must hold the run's class names as a JSON list: {error}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RunError(f"{path} must hold the run's class names as a JSON list of texts")
    return tuple(labels)


# ---------------------------------------------------------------- the formats


def write_merged_folder(source: ExportSource, folder: Path) -> None:
    """Fill a folder with the merged model.

    Raises:
        ModelError, RunError: as `write_merged`.
        MissingExtraError: torch or transformers is not installed.
    """
    with _needing_train_extra():
        from fedtune.export.merge import write_merged
    write_merged(source.base, source.adapter, source.task, source.labels, folder)


def write_peft_folder(source: ExportSource, folder: Path) -> None:
    """Fill a folder with the adapter in PEFT's form.

    Raises:
        ModelError: the adapter does not fit the base.
        MissingExtraError: torch or transformers is not installed.
    """
    with _needing_train_extra():
        from fedtune.export.peft_adapter import write_peft
    write_peft(
        source.base,
        source.adapter,
        source.task,
        source.labels,
        folder,
        source.base_name,
        source.revision,
    )


def _write_merged(source: ExportSource, exports: Path, keep: bool) -> Path:
    """Write the merged folder; one that only ONNX needs keeps its temporary name."""
    if keep:
        return _publish(exports / "merged", partial(write_merged_folder, source))
    folder = _temporary(exports / "merged")
    write_merged_folder(source, folder)
    return folder


def _write_onnx(source: ExportSource, merged: Path, exports: Path) -> Path:
    """Write `model.onnx` and, for a large model, `model.onnx.data`, which it names."""
    with _needing_train_extra():
        from fedtune.export.onnx_model import write_onnx

    folder = _temporary(exports / "onnx")
    written = write_onnx(merged, source.task, source.labels, folder)
    final = exports / written.name
    final.unlink(missing_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file == written):  # the graph last
        file.replace(exports / file.name)
    return final


@contextmanager
def _needing_train_extra() -> Iterator[None]:
    """Turn a missing torch or transformers into the error that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MissingExtraError(error.name, "train", "exporting a model") from None


# ---------------------------------------------------------------- nothing half-written


def _publish(final: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, then put it in the place of `final`."""
    temporary, old = _temporary(final), final.with_name(f".{final.name}.old")
    write(temporary)
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    if old.exists():
        shutil.rmtree(old)
    return final


def _temporary(final: Path) -> Path:
    folder = final.with_name(f".{final.name}.partial")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _clear_leftovers(exports: Path) -> None:
    """Remove temporary folders of this export and of one that was killed."""
    for pattern in (".*.partial", ".*.old"):
        for folder in exports.glob(pattern):
            shutil.rmtree(folder)
