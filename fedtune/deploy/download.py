"""Downloads a run or a base model from the coordinator; what was cut at any byte goes on there.

A file grows under a temporary name, by chunks whose digests were checked, and gets its own name
when its whole digest is right and it is on the disk. What a crash left of it is kept, but for the
last chunk, which is fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from filelock import FileLock, Timeout

from fedtune.deploy.channel import spoken
from fedtune.deploy.manifest import CHUNK_BYTES, RemoteFile, read_manifest
from fedtune.errors import DeploymentError, ProtocolError
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import ArtifactServiceStub
from fedtune.wire.durable import sync_folder, writing

Progress = Callable[[int, int], None]
"""Is told of bytes that are here, and of all bytes."""

_MANIFEST_S = 1800.0
"""The coordinator may have to read a base of 100 GB for its digests."""
_STREAM_S = 6 * 3600.0
_MOST_FAILURES = 8
"""In a row, without a chunk between them."""
_MOST_CHANGES = 5
_CHANGE_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
)

_log = logging.getLogger(__name__)


class _ChangedError(ProtocolError):
    """The file is not the manifest's any more, or what came is damaged."""


def download(
    channel: Any,  # a grpc.Channel; grpc has no types
    of: pb.ManifestRequest,
    target: Path,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Path, ...]:
    """Have all files of a run or a base in a folder; returns their paths.

    Files that are there whole are not fetched again, others of their names are replaced, and
    files of other names stay. A connection that breaks is opened again, with pauses of up to
    30 s, until nothing came 8 times in a row.

    Raises:
        AccessError: the caller has no right to it.
        DeploymentError: the coordinator does not answer or does not have it, or another process
            downloads to the folder.
        ProtocolError: what the coordinator sends is not what a manifest or a file must be.
        RunError: the disk is full or cannot be written.
    """
    with _alone(target):
        fetcher = _Fetcher(channel, of, target, progress or (lambda here, total: None), sleep)
        for attempt in range(1, _MOST_CHANGES + 1):
            try:
                return fetcher.fetch_all()
            except _ChangedError as error:
                if attempt == _MOST_CHANGES:
                    raise
                _log.warning("it is asked anew what there is: %s", error)
                sleep(_CHANGE_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


class _Fetcher:
    """One download: what is fetched from where to where, and how often it failed in a row."""

    def __init__(
        self,
        channel: Any,
        of: pb.ManifestRequest,
        target: Path,
        progress: Progress,
        sleep: Callable[[float], None],
    ) -> None:
        # Generated code has no types.
        self._stub: Any = ArtifactServiceStub(channel)  # type: ignore[no-untyped-call]
        self._of, self._target = of, target
        self._progress, self._sleep = progress, sleep
        self._failures = 0
        self._done = self._total = 0

    def fetch_all(self) -> tuple[Path, ...]:
        """Have every file of the manifest here."""
        manifest = self._again(lambda: self._stub.GetManifest(self._of, timeout=_MANIFEST_S))
        files = read_manifest(manifest)
        _check_space(self._target, files)
        self._done, self._total = 0, sum(file.size for file in files)
        paths = []
        for file in files:
            path = _place(self._target, file)
            if not _is_here(path, file):
                self._fetch(file, path)
            self._done += file.size
            self._progress(self._done, self._total)
            paths.append(path)
        return tuple(paths)

    def _fetch(self, file: RemoteFile, path: Path) -> None:
        """Bring one file here whole, going on with what is here of it."""
        partial = path.with_name(f".{path.name}.{file.sha256[:16]}.partial")
        with writing(partial):
            for other in path.parent.glob(f".{_as_pattern(path.name)}.*.partial"):
                if other != partial:
                    other.unlink()  # of what the file was before
            with partial.open("ab+") as stream:
                whole = _keep_good(stream, file.size)
                if stream.tell() < file.size:
                    self._again(lambda: self._receive(file, stream, whole))
                stream.flush()
                os.fsync(stream.fileno())
            if whole.hexdigest() != file.sha256:
                # What was kept of an earlier try was damaged, or the manifest is wrong.
                partial.unlink()
                raise _ChangedError(
                    f"{file.path}: expected sha256 {file.sha256}, found {whole.hexdigest()}"
                )
            os.replace(partial, path)
            sync_folder(path.parent)

    def _receive(self, file: RemoteFile, stream: Any, whole: Any) -> None:
        """Append chunks until the file is complete or the connection breaks."""
        request = pb.DownloadRequest(of=self._of, path=file.path, offset=stream.tell())
        call = self._stub.Download(request, timeout=_STREAM_S)
        try:
            for chunk in call:
                _check_chunk(file, chunk, stream.tell())
                stream.write(chunk.data)
                whole.update(chunk.data)
                self._failures = 0
                self._progress(self._done + stream.tell(), self._total)
        finally:
            call.cancel()
        if stream.tell() < file.size:
            raise _ChangedError(f"{file.path}: expected {file.size} bytes, found {stream.tell()}")

    def _again(self, work: Callable[[], Any]) -> Any:
        """The result of some work, which is tried again while that may help."""
        while True:
            try:
                return work()
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.ABORTED:
                    raise _ChangedError(str(spoken(error))) from None
                self._failures += 1
                if error.code() not in _AGAIN or self._failures >= _MOST_FAILURES:
                    raise spoken(error) from None
                pause = min(_LONGEST_PAUSE_S, 0.25 * 2.0**self._failures)
                _log.warning("download goes on in %.1f s: %s", pause, spoken(error))
                self._sleep(pause)


def _check_chunk(file: RemoteFile, chunk: pb.Chunk, here: int) -> None:
    if chunk.offset != here or not 0 < len(chunk.data) <= file.size - here:
        raise _ChangedError(
            f"{file.path}: expected 1 to {file.size - here} bytes at {here}, found "
            f"{len(chunk.data)} at {chunk.offset}"
        )
    if hashlib.sha256(chunk.data).digest() != chunk.sha256:
        raise _ChangedError(f"{file.path}: the chunk at {here} does not have its sha256")


# ---------------------------------------------------------------- on this machine's disk


def _is_here(path: Path, file: RemoteFile) -> bool:
    with writing(path):
        return path.is_file() and path.stat().st_size == file.size and _digest(path) == file.sha256


def _keep_good(stream: Any, size: int) -> Any:
    """Cut what a crash may have left half, go to the end, and take the digest of what stays."""
    stream.seek(0, 2)
    have = stream.tell()
    stream.truncate(0 if have > size else max(0, have - 1) // CHUNK_BYTES * CHUNK_BYTES)
    stream.seek(0)
    whole = hashlib.sha256()
    while piece := stream.read(CHUNK_BYTES):
        whole.update(piece)
    return whole


def _place(target: Path, file: RemoteFile) -> Path:
    """Where a file goes; its folder exists and is no link out of the target."""
    path = target.joinpath(*file.path.split("/"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        inside = path.parent.resolve().is_relative_to(target.resolve())
    if not inside or path.is_symlink() or path.is_dir():
        raise DeploymentError(
            f"{path} is a link or a folder, expected a file or nothing; remove it, or choose "
            "another folder"
        )
    return path


def _check_space(target: Path, files: tuple[RemoteFile, ...]) -> None:
    here = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    needed = sum(file.size for file in files) - here
    free = shutil.disk_usage(target).free
    if needed > free:
        with writing(target):
            raise OSError(
                errno.ENOSPC, f"needs {needed} bytes more, the disk has {free} free", str(target)
            )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_pattern(name: str) -> str:
    """A name as a pattern that only it matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target / ".download.lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise DeploymentError(
            f"another process downloads to {target}; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise DeploymentError(f"{target} cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()
