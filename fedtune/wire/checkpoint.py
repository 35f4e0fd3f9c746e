"""One file per round that holds the coordinator's whole numerical state.

A checkpoint is a safetensors file `round-0007.safetensors` with its sha256 in a file beside it
(`round-0007.safetensors.sha256`, in the form that `sha256sum -c` reads). Both are written to a
temporary name, flushed to the disk and renamed, the digest first: a checkpoint exists from the
moment its tensors have their name, and a process killed at any moment leaves either all of it or
nothing. Equal input gives equal bytes. One that a disk or a hand has damaged is put aside, and the
one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.errors import RunError, one_line
from fedtune.records import FloatArray, GlobalAdapter, LowRank
from fedtune.wire.durable import PARTIAL, write_durably, writing

LAYOUT = "fedtune-checkpoint-1"
_NAME = re.compile(r"round-(\d{4,})\.safetensors")
_DAMAGED = ".damaged"
_FACTORS = ("u", "sigma", "v")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one checkpoint file holds.

    Attributes:
        extra: further states of the coordinator in the same form, such as a momentum.
        meta: texts, such as the run id and the base model's digest (`base_digest`).
    """

    adapter: GlobalAdapter
    extra: Mapping[str, GlobalAdapter] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)


def write_checkpoint(
    folder: Path,
    adapter: GlobalAdapter,
    extra: Mapping[str, GlobalAdapter] | None = None,
    meta: Mapping[str, str] | None = None,
) -> Path:
    """Write the state after a round so that a crash leaves all of it or nothing.

    Args:
        folder: is created when missing.
        adapter: its `round` names the file.
        extra: further states by name, such as a momentum; default none.
        meta: texts to keep with the state; default none.

    Returns:
        The checkpoint file.

    Raises:
        RunError: it cannot be written; the checkpoints before it stay as they are.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = _encode(Checkpoint(adapter, extra or {}, meta or {}))
    path = folder / f"round-{adapter.round:04d}.safetensors"
    digest_line = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    write_durably(_digest_path(path), digest_line.encode())
    write_durably(path, content)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and prove that it is the one that was written.

    Raises:
        RunError: the file or its digest is missing, or the content does not have that digest or
            is not a checkpoint of this layout.
    """
    try:
        content = path.read_bytes()
        expected = _digest_path(path).read_text(encoding="utf-8").split()[:1]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"checkpoint {path} cannot be read: {error}; {_REMEDY}") from None
    found = hashlib.sha256(content).hexdigest()
    if expected != [found]:
        raise RunError(
            f"checkpoint {path} is damaged: expected sha256 {(expected or ['none'])[0]}, "
            f"found {found}; {_REMEDY}"
        )
    try:
        return _decode(content)
    except (
        SafetensorError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        OverflowError,
    ) as e:
        reason = one_line(str(e), 300)
        raise RunError(f"checkpoint {path} is not a {LAYOUT} file: {reason}; {_REMEDY}") from None


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest round, or None where there is none."""
    return max(_checkpoints(folder), default=(0, None), key=lambda item: item[0])[1]


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder, the newest last."""
    return [path for _, path in sorted(_checkpoints(folder))]


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that is whole.

    Attributes:
        skipped: why each newer one was put aside, newest first; one line each.
    """

    checkpoint: Checkpoint
    skipped: tuple[str, ...] = ()


def find_checkpoint(folder: Path) -> Found | None:
    """Read the newest checkpoint that is whole; None where no checkpoint was written.

    A newer one that is not gets `.damaged` at the end of its name: nothing reads it from then on,
    and it can still be looked at.

    Raises:
        RunError: none of those that are there is whole.
    """
    skipped: list[str] = []
    for _, path in sorted(_checkpoints(folder), reverse=True):
        try:
            return Found(read_checkpoint(path), tuple(skipped))
        except RunError as error:
            skipped.append(str(error).removesuffix(f"; {_REMEDY}"))
            with writing(path):
                path.replace(path.with_name(path.name + _DAMAGED))
                _digest_path(path).unlink(missing_ok=True)
    if not skipped:
        return None
    raise RunError(
        f"no checkpoint in {folder} is whole; the newest: {skipped[0]}; start anew with --overwrite"
    )


def as_written(adapter: GlobalAdapter) -> GlobalAdapter:
    """The state with its arrays laid out as in a file.

    Products of equal numbers in another memory layout may round otherwise: a run that goes on in
    memory must hold what one that reads its checkpoint holds.
    """
    return replace(
        adapter,
        matrices={
            name: LowRank(*(np.ascontiguousarray(getattr(pair, factor)) for factor in _FACTORS))
            for name, pair in adapter.matrices.items()
        },
        dense={name: np.ascontiguousarray(array) for name, array in adapter.dense.items()},
    )


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what a crash left half-written.

    Raises:
        ValueError: keep is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for _, path in sorted(_checkpoints(folder))[:-keep]:
        path.unlink()
        _digest_path(path).unlink(missing_ok=True)
    for leftover in folder.glob(f"round-*{PARTIAL}"):
        leftover.unlink()
    for digest in folder.glob("round-*.safetensors.sha256"):
        if not digest.with_suffix("").exists():
            digest.unlink()


_REMEDY = "delete it and its .sha256 file to continue from the round before"


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Round and path of every checkpoint in a folder, in no order."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


# ---------------------------------------------------------------- the layout


def _encode(checkpoint: Checkpoint) -> bytes:
    """Tensors `<state>/<matrix>.u` and so on; all else as one JSON text in the header.

    One text, because safetensors writes several in an order that changes from run to run. The
    text lists the matrices in the adapter's own order, which the tensors' order would lose: a
    continued run must add up in the order of one never interrupted.
    """
    states = {"adapter": checkpoint.adapter}
    states |= {f"extra/{name}": state for name, state in checkpoint.extra.items()}
    tensors: dict[str, FloatArray] = {}
    for state_name, state in states.items():
        for name, low_rank in state.matrices.items():
            for factor in _FACTORS:
                tensors[f"{state_name}/{name}.{factor}"] = getattr(low_rank, factor)
        tensors |= {f"{state_name}/dense.{name}": array for name, array in state.dense.items()}
    facts = {
        "layout": LAYOUT,
        "meta": dict(checkpoint.meta),
        "states": {name: _facts(state) for name, state in states.items()},
    }
    # safetensors stores the buffer as it lies: a transposed view would come back scrambled
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return save(contiguous, {"fedtune": json.dumps(facts, sort_keys=True)})


def _facts(state: GlobalAdapter) -> dict[str, object]:
    return {
        "round": state.round,
        "matrices": list(state.matrices),
        "dense": list(state.dense),
        "dropped_energy": {name: float(share) for name, share in state.dropped_energy.items()},
    }


def _decode(content: bytes) -> Checkpoint:
    tensors = load(content)
    header_size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_size])
    facts = json.loads(header["__metadata__"]["fedtune"])
    if facts["layout"] != LAYOUT:
        raise ValueError(f"its layout is {facts['layout']!r}")
    states: dict[str, GlobalAdapter] = {}
    for state_name, state in facts["states"].items():
        prefix = f"{state_name}/"
        states[state_name] = GlobalAdapter(
            round=int(state["round"]),
            matrices={
                name: LowRank(*(tensors.pop(f"{prefix}{name}.{factor}") for factor in _FACTORS))
                for name in state["matrices"]
            },
            dense={name: tensors.pop(f"{prefix}dense.{name}") for name in state["dense"]},
            dropped_energy=state["dropped_energy"],
        )
    if tensors:
        raise ValueError(f"it holds tensors that it does not list, such as {min(tensors)}")
    adapter = states.pop("adapter")
    extra = {name.removeprefix("extra/"): state for name, state in states.items()}
    return Checkpoint(adapter, extra, facts["meta"])
