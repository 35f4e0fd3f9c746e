"""Where the base model is: a folder, or a hub id that is downloaded once; and its digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Final

from fedtune.errors import ModelError

_INDEX: Final = "model.safetensors.index.json"
_ALLOWED: Final = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_IGNORED: Final = ("*/*", "consolidated*", "adapter_*", "*.onnx*")
"""Copies of the same weights for other programs, and whatever lies in subfolders."""
_CHUNK_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 100_000_000
"""The safetensors format's own limit."""
_MAX_JSON_BYTES: Final = 64 << 20
"""Far above any config or index in use (the largest index, of 10^5 tensors, has 10 MB)."""

_HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FileState = tuple[str, int, int, int, int]
_digests: dict[tuple[_FileState, ...], str] = {}
"""Digests by the state of every file (see `_file_state`); for this process only."""
_REMEMBERED_BYTES: Final = 256 << 20
"""Smaller bases are hashed in well under a second; chosen."""
_SETTLED_S: Final = 2.0
"""A file may change twice within one tick of its file system's clock (FAT: 2 s)."""


def resolve_model(path: str, revision: str = "main") -> Path:
    """The folder of a base model; a hub id is downloaded unless the hub's cache has it.

    Args:
        path: a folder with config.json and safetensors weights, or a hub id such as `org/name`.
        revision: branch, tag or commit; only for a hub id.

    Raises:
        ModelError: there is no such folder or hub id, it cannot be downloaded, or the folder
            lacks what is needed.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(path, revision)
    weight_files(folder)
    read_json(folder / "config.json")
    return folder


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that hold a folder's weights, sorted by name.

    As transformers does, `model.safetensors` goes before the index of a sharded model; a single
    file of another name is accepted, too.

    Raises:
        ModelError: the folder lacks config.json or safetensors weights, or a shard of the index.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder} has no config.json; expected a folder in Hugging Face form "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if (folder / _INDEX).is_file():
        return _shards(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    if found:
        names = ", ".join(file.name for file in found[:3])
        raise ModelError(
            f"model folder {folder} has several safetensors files ({names}, ...) and no {_INDEX} "
            "that says which are the weights; add the index, or keep one file"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ModelError(
            f"model folder {folder} has its weights as pickle files (.bin, .pt), which can run "
            "code when read and are not opened; convert them with transformers: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise ModelError(f"model folder {folder} has no *.safetensors file with the weights")


def base_digest(folder: Path, remembered: Path | None = None) -> str:
    """Hex sha256 over config.json and every weight file: name, size and content, streamed.

    A file is hashed once as long as its size, its place on disk and its times of change stay what
    they were: within a process always, and between processes where `remembered` is given. A
    program can set a file's time of modification but not, on Unix, that of its last change of any
    kind, so a file that was replaced or written to is hashed again. Only who can already change
    the remembered digests, or the clock, gets past that.

    Args:
        remembered: folder for digests of large bases; it is as private as the base itself.

    Raises:
        ModelError: the folder lacks a file or one cannot be read.
    """
    files = (folder / "config.json", *weight_files(folder))
    try:
        state = tuple(_file_state(file) for file in files)
        if state not in _digests:
            _digests[state] = _recall(files, state, remembered)
    except OSError as error:
        raise ModelError(f"model folder {folder} cannot be read ({error.strerror})") from None
    return _digests[state]


def header_digest(folder: Path) -> str:
    """Hex sha256 over config.json and every weight file's name, size and header; no weight is read.

    Raises:
        ModelError: the folder lacks a file or one cannot be read.
    """
    files = weight_files(folder)
    digest = hashlib.sha256()
    try:
        config = (folder / "config.json").read_bytes()
        digest.update(f"config.json\0{len(config)}\0".encode() + config)
        for file in files:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                digest.update(f"{file.name}\0{file.stat().st_size}\0{length}\0".encode())
                digest.update(stream.read(min(length, MAX_HEADER_BYTES)))
    except OSError as error:
        raise ModelError(f"model folder {folder} cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a model folder.

    Raises:
        ModelError: the file is missing, too large, not UTF-8, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB; is it a config?")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not valid JSON; is the download complete?") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return values


def _shards(folder: Path) -> tuple[Path, ...]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / _INDEX} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # The index names files of its own folder; a path elsewhere is not followed.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder / _INDEX} names {name!r}, which is not a safetensors file")
        if not (folder / name).is_file():
            raise ModelError(f"model folder {folder} lacks {name}, which {_INDEX} names")
    return tuple(folder / name for name in names)


def _file_state(file: Path) -> _FileState:
    """Path, bytes, inode, and when content and anything else last changed, in ns."""
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _recall(files: tuple[Path, ...], state: tuple[_FileState, ...], remembered: Path | None) -> str:
    """The digest that was remembered for this state, or a new one, remembered from now on."""
    if remembered is None or sum(size for _, size, *_ in state) < _REMEMBERED_BYTES:
        return _hash_files(files)
    note = remembered / hashlib.sha256(json.dumps(state).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        found = note.read_text(encoding="ascii")
        if _HEX_DIGEST.fullmatch(found):
            return found
    started = time.time()
    digest = _hash_files(files)
    newest = max(max(mtime, ctime) for *_, mtime, ctime in state)
    unchanged = state == tuple(_file_state(file) for file in files)
    if unchanged and started - newest / 1e9 > _SETTLED_S:
        with contextlib.suppress(OSError):
            _write_whole(note, digest)
    return digest


def _write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(text)
    Path(name).replace(path)


def _hash_files(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        # Length before content: no two lists of files give the same stream of bytes.
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _download(path: str, revision: str) -> Path:
    if not _HUB_ID.fullmatch(path):
        raise ModelError(
            f"there is no model folder {path}, and it is not a hub id such as org/name; set "
            "model.path"
        )
    # Imported here: a run from a folder never needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        found = snapshot_download(
            path,
            revision=revision,
            allow_patterns=list(_ALLOWED),
            ignore_patterns=list(_IGNORED),
        )
    except GatedRepoError:
        reason = "its owner asks for a login: run `hf auth login` and accept the terms there"
    except RevisionNotFoundError:
        reason = f"the hub has no revision {revision!r} of it; see model.revision"
    except RepositoryNotFoundError:
        reason = "the hub has no public model of that name"
    except (OSError, ValueError, HfHubHTTPError) as error:
        # Offline, or the hub does not answer; the details are pages long.
        reason = f"no such folder here, not in the hub's cache, and no download ({_first(error)})"
    else:
        return Path(str(found))
    raise ModelError(f"model {path} cannot be had: {reason}")


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."
