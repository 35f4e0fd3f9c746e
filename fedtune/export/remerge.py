"""The proof that an exported model is base plus adapter: it is made again and compared.

Files may differ where another version of a library writes other metadata; the tensors may not.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedtune.export.run_export import (
    ExportSource,
    export_source,
    write_merged_folder,
    write_peft_folder,
)
from fedtune.export.verification import EXPORT_PLACES, Check

_WRITERS: Mapping[str, Callable[[ExportSource, Path], None]] = {
    "merged": write_merged_folder,
    "peft": write_peft_folder,
}


def verify_deep(folder: Path, base: str = "") -> Iterator[Check]:
    """Make the exported models again, from the last checkpoint and the base, and compare them.

    They are made in the system's temporary folder, which needs room for one of them.

    Args:
        folder: run folder; it is only read.
        base: base model to use instead of the run file's; it must be the same model.

    Raises:
        ConfigError: the folder's config.json is wrong.
        RunError: there is no usable checkpoint, or the base is not the one that was trained on.
        ModelError: the base cannot be loaded, or the adapter does not fit it.
        MissingExtraError: torch or transformers is not installed.
    """
    made = {kind: folder / EXPORT_PLACES[kind] for kind in _WRITERS}
    there = {kind: path for kind, path in made.items() if path.is_dir()}
    if not there:
        yield Check("exports", "unproven", "no merged model and no PEFT adapter is there")
        return
    source = export_source(folder, base)
    for kind, path in there.items():
        with tempfile.TemporaryDirectory(prefix="fedtune-") as temporary:
            _WRITERS[kind](source, Path(temporary))
            yield _compared(f"{EXPORT_PLACES[kind]} made again", path, Path(temporary), source)


def _compared(subject: str, path: Path, again: Path, source: ExportSource) -> Check:
    try:
        found = tensor_digests(path)
    except (OSError, ValueError) as error:
        return Check(subject, "wrong", f"a safetensors file cannot be read: {error}")
    expected = tensor_digests(again)
    where = f"base {source.base} and the checkpoint of round {source.adapter.round}"
    if found.keys() != expected.keys():
        odd = min(found.keys() ^ expected.keys())
        place = "only in the export" if odd in found else "missing in the export"
        return Check(subject, "wrong", f"tensor {odd} is {place}; made from {where}")
    for name, digest in expected.items():
        if found[name] != digest:
            text = f"tensor {name} differs from what {where} give"
            return Check(subject, "wrong", text)
    return Check(subject, "ok", f"{len(expected)} tensors are those of {where}")


def tensor_digests(folder: Path) -> dict[str, str]:
    """Name of every tensor in a folder's safetensors files -> dtype, shape and sha256.

    The values are hashed as they lie, so that no dtype needs a library that knows it.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not in the form of safetensors.
    """
    digests: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError(f"{file.name} has no header of safetensors")
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                stream.seek(8 + size + begin)
                values = hashlib.sha256(stream.read(end - begin)).hexdigest()
                digests[name] = f"{entry['dtype']} {entry['shape']} {values}"
    return digests
