"""The distortion table of a base: measured once on this machine, and kept by the base's digest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fedtune.errors import ModelError, ProtocolError
from fedtune.model.source import weight_files
from fedtune.quant.distortion import measure_distortion
from fedtune.records import DistortionTable, MatrixForm, MatrixShape, ModelShapes
from fedtune.wire.distortion import distortion_json, read_distortion

OnProgress = Callable[[int, int], None]
"""Told how many matrices are done, and of how many."""

_QUIET_S = 2.0
"""Seconds between two reports of progress; a measurement that is over sooner reports none."""


def base_distortion(
    folder: Path,
    shapes: ModelShapes,
    forms: Sequence[MatrixForm],
    cache: Path,
    on_progress: OnProgress = lambda done, of: None,
) -> DistortionTable:
    """The table of a base's matrices in these forms, from the cache as far as it has them.

    Args:
        folder: the base model.
        shapes: of the same base; says which matrices.
        cache: folder of tables, one file per base; created when missing.
        on_progress: called at most every other second.

    Raises:
        ModelError: a matrix cannot be read from the base.
        MissingExtraError: a form needs a package that is not installed.
    """
    path = cache / f"{shapes.digest}.json"
    names = [matrix.name for matrix in shapes.matrices]
    known = _cached(path, shapes.digest)
    wanted = tuple(sorted(set(forms)))
    have = set() if known is None or not set(names) <= known.errors.keys() else set(known.forms)
    missing = [form for form in wanted if form not in have]
    if missing:
        report = _Progress(len(names), on_progress)
        found = measure_distortion(_weights(folder, shapes), missing, shapes.digest, report)
        known = found if not have or known is None else _joined(known, found)
        _write(path, known)
    assert known is not None
    return _selected(known, names, wanted)


class _Progress:
    """Counts matrices, and says so not too often."""

    def __init__(self, of: int, on_progress: OnProgress) -> None:
        self._of, self._on_progress = of, on_progress
        self._done, self._said = 0, time.monotonic()

    def __call__(self, name: str) -> None:
        self._done += 1
        if time.monotonic() - self._said >= _QUIET_S:
            self._said = time.monotonic()
            self._on_progress(self._done, self._of)


def _weights(folder: Path, shapes: ModelShapes) -> Iterator[tuple[str, Tensor]]:
    """Name and weight (out, in) of each matrix, read one after the other."""
    left = {f"{matrix.name}.weight": matrix for matrix in shapes.matrices}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(left.keys() & set(opened.keys())):
                matrix = left.pop(name)
                yield matrix.name, _oriented(opened.get_tensor(name), matrix)
    if left:
        raise ModelError(f"model folder {folder} has no matrix {min(left)}")


def _oriented(weight: Tensor, matrix: MatrixShape) -> Tensor:
    """The weight as (out, in), whichever way the file has it."""
    return weight if weight.shape[0] == matrix.out_features else weight.t()


def _cached(path: Path, digest: str) -> DistortionTable | None:
    """A table that was written before; a damaged one is measured again."""
    if not path.exists():
        return None
    try:
        table = read_distortion(path)
    except ProtocolError:
        return None
    return table if table.base_digest == digest else None


def _joined(first: DistortionTable, second: DistortionTable) -> DistortionTable:
    """Both tables' forms, for the matrices that both have."""
    names = first.errors.keys() & second.errors.keys()
    errors = {name: first.errors[name] + second.errors[name] for name in sorted(names)}
    return DistortionTable(first.base_digest, first.forms + second.forms, errors)


def _selected(
    table: DistortionTable, names: Sequence[str], forms: Sequence[MatrixForm]
) -> DistortionTable:
    columns = [table.forms.index(form) for form in forms]
    errors = {name: tuple(table.errors[name][column] for column in columns) for name in names}
    return DistortionTable(table.base_digest, tuple(forms), errors, table.weighting)


def _write(path: Path, table: DistortionTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(distortion_json(table)) + "\n", encoding="utf-8")
    os.replace(temporary, path)
