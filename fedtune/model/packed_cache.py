"""Finished matrices on disk, so that a second start of a device maps them instead of quantising.

One safetensors file holds every matrix of one base in one set of forms. Its name is

    <what it was made from>.<what is in it>.safetensors

two digests: of the base, the forms and the layout; and of the file's content. A file is written
under another name, flushed to disk and then renamed, so that it is there whole or not at all; and
its content is hashed before it is used, because a disk may have lost or changed a part of it. The
digest guards against accidents. Who may write to the folder could also rename a file: the folder
deserves as much trust as the folder of the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.quant.correction import Pair
from fedtune.quant.storage import StoredMatrix, restore
from fedtune.records import MatrixForm

LAYOUT: Final = 1
"""Raise it when anything changes what a form makes of a matrix, or how it is written."""

MINIMUM_BYTES: Final = 64 << 20
"""Smaller bases are quantised again in less than a second or two; chosen."""

_KEPT_FILES: Final = 4
"""Files in the folder, newest use first; every change of plan writes another one."""

_PIECE_BYTES: Final = 16 << 20
_READ_BYTES: Final = 1 << 20
_ALIGNMENT: Final = 64

_DTYPES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}

_log = logging.getLogger(__name__)


_PAIR: Final = ("pair.a", "pair.b")
"""Names of a correction pair among the tensors of its matrix."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Matrices as a device computes with them, by name, and the pairs that repair some of them."""

    matrices: Mapping[str, StoredMatrix]
    pairs: Mapping[str, Pair] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        parts = (*self.matrices.values(), *self.pairs.values())
        return sum(part.bytes for part in parts)


@dataclass(frozen=True, slots=True)
class PackedCache:
    """A folder of finished matrices.

    Attributes:
        folder: is created when there is something to keep.
        minimum_bytes: sets of matrices that are smaller together are not kept.
    """

    folder: Path
    minimum_bytes: int = MINIMUM_BYTES

    def read(self, base: str, forms: Mapping[str, MatrixForm]) -> Finished | None:
        """Every matrix in its form, mapped from disk; None when that is not at hand.

        A file whose content is not what its name says is deleted.

        Args:
            base: digest of the base.
        """
        for path in sorted(self.folder.glob(f"{_key(base, forms)}.*.safetensors")):
            try:
                if content_digest(path) == path.name.split(".")[1]:
                    os.utime(path)
                    return _load(path, forms)
                reason = "its content has changed"
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                reason = str(error)
            _log.warning("%s is deleted and made anew: %s", path, reason)
            _remove(path)
        return None

    def write(self, base: str, forms: Mapping[str, MatrixForm], finished: Finished) -> None:
        """Keep matrices; a disk that takes no more is no error."""
        size = finished.bytes
        if size < self.minimum_bytes:
            return
        temporary: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < 2 * size:
                raise OSError(f"there is no room for {size} bytes")
            handle, name = tempfile.mkstemp(".part", "packed-", self.folder)
            temporary = Path(name)
            with os.fdopen(handle, "wb") as stream:
                for part in _serialise(finished):
                    stream.write(part)
                stream.flush()
                os.fsync(stream.fileno())
            content = content_digest(temporary)
            temporary.replace(self.folder / f"{_key(base, forms)}.{content}.safetensors")
            self._prune()
        except OSError as error:
            _log.warning("packed matrices are not kept in %s: %s", self.folder, error)
            if temporary is not None:
                _remove(temporary)

    def _prune(self) -> None:
        """Delete all but the files that were used last."""
        files = sorted(self.folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime)
        for path in files[:-_KEPT_FILES]:
            _remove(path)


def content_digest(path: Path) -> str:
    """Hex sha256 over the sha256 of each 16 MiB of a file; the pieces are hashed side by side.

    Raises:
        OSError: the file cannot be read.
    """
    starts = range(0, path.stat().st_size, _PIECE_BYTES)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pieces = pool.map(lambda start: _piece_digest(path, start), starts)
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def _piece_digest(path: Path, start: int) -> bytes:
    digest, buffer, left = hashlib.sha256(), bytearray(_READ_BYTES), _PIECE_BYTES
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer)):
            digest.update(memoryview(buffer)[:count])
            left -= count
    return digest.digest()


def _key(base: str, forms: Mapping[str, MatrixForm]) -> str:
    content = [LAYOUT, base, sorted((name, *astuple(form)) for name, form in forms.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _serialise(finished: Finished) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the library's own writer copies all tensors first.

    Source: https://github.com/huggingface/safetensors#format
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, str] = {}
    for name, matrix in finished.matrices.items():
        described[name] = json.dumps(
            {"format": matrix.format, "shape": matrix.shape, "metadata": matrix.metadata()}
        )
        tensors |= {f"{name}/{part}": tensor for part, tensor in matrix.tensors().items()}
    for name, pair in finished.pairs.items():
        tensors |= {f"{name}/{part}": t for part, t in zip(_PAIR, (pair.a, pair.b), strict=True)}
    # Wide numbers first: each tensor then starts at a multiple of its own width.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": described}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), _DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        yield _bytes_of(tensors[name])


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _load(path: Path, forms: Mapping[str, MatrixForm]) -> Finished:
    with safe_open(path, framework="pt") as opened:
        described = opened.metadata()
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in forms}
        for key in opened.keys():  # noqa: SIM118  an opened file is not a mapping
            name, _, part = key.rpartition("/")
            tensors[name][part] = opened.get_tensor(key)
    found: dict[str, StoredMatrix] = {}
    pairs: dict[str, Pair] = {}
    for name, form in forms.items():
        if form.correction_rank:
            a, b = (tensors[name].pop(part) for part in _PAIR)
            pairs[name] = Pair(a, b)
        about = json.loads(described[name])
        rows, columns = about["shape"]
        found[name] = restore(about["format"], (rows, columns), tensors[name], about["metadata"])
    return Finished(found, pairs)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
