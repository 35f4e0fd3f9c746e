"""ArtifactService: what a run has made and base models, in chunks, from any byte on."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import grpc

from fedtune.deploy.manifest import CHUNK_BYTES
from fedtune.errors import FedtuneError
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import ArtifactServiceServicer
from fedtune_server.desk.artifacts import Bases, Digests, LocalFile, base_files, run_files
from fedtune_server.desk.calls import CallRefusedError, caller
from fedtune_server.desk.credentials import Gate
from fedtune_server.desk.facts import Desk
from fedtune_server.desk.queue import UnknownRunError
from fedtune_server.desk.rates import Bandwidth
from fedtune_server.desk.telemetry import SERVED_BYTES

_DIGEST = re.compile(r"[0-9a-f]{64}")
_AT_ONCE, _AT_ONCE_EACH = 64, 4
_LOOK_S = 5.0
"""How often it is asked whether the site that downloads has been revoked."""
_HASHING = 4
"""Threads that may read whole files for their digests: the other services have their own."""

_T = TypeVar("_T")


class ArtifactService(ArtifactServiceServicer):
    """Serves files; a caller has a few streams at most, and all share the bandwidth."""

    def __init__(
        self, gate: Gate, desk: Desk, bases: Bases, digests: Digests, bandwidth: Bandwidth
    ) -> None:
        self._gate, self._desk, self._bases, self._digests = gate, desk, bases, digests
        self._bandwidth = bandwidth
        self._hashing = ThreadPoolExecutor(_HASHING, "artifacts")
        self._open: Counter[str] = Counter()

    async def GetManifest(self, request: pb.ManifestRequest, context: Any) -> pb.Manifest:
        """The files of a run or a base."""
        role, name = caller().role, caller().name
        return await self._aside(lambda: self._manifest(request, role, name))

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.Chunk]:
        """A file's bytes from an offset on."""
        role, name = caller().role, caller().name
        with self._counted(f"{role} {name}"):
            file = await self._aside(lambda: self._find(request, role, name))
            stream = await asyncio.to_thread(_opened, file)
            with stream:
                offset, look_at = request.offset, time.monotonic() + _LOOK_S
                while True:
                    if role == "site" and time.monotonic() >= look_at:
                        await asyncio.to_thread(self._gate.check_still_admitted, name)
                        look_at = time.monotonic() + _LOOK_S
                    data = await asyncio.to_thread(_piece, stream, file, offset)
                    if not data:
                        return
                    await self._bandwidth.pass_on(len(data))
                    digest = hashlib.sha256(data).digest()
                    yield pb.Chunk(offset=offset, data=data, sha256=digest)
                    SERVED_BYTES.inc(len(data))
                    offset += len(data)

    async def _aside(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._hashing, work)

    # ------------------------------------------------------------ which files

    def _files(
        self, what: pb.ManifestRequest, role: str, name: str
    ) -> tuple[str, tuple[LocalFile, ...]]:
        if what.WhichOneof("what") == "run":
            folder = self._desk.folder(what.run)
            if role == "site" and not self._desk.takes_part(name, what.run):
                raise UnknownRunError(f"no run is called {what.run[:100]!r} here")
            return what.run, run_files(folder)
        if _DIGEST.fullmatch(what.base_digest):
            return what.base_digest, base_files(self._bases.find(what.base_digest))
        raise CallRefusedError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "expected the name of a run, or the sha256 of a base in hex; found neither",
        )

    def _manifest(self, what: pb.ManifestRequest, role: str, name: str) -> pb.Manifest:
        called, files = self._files(what, role, name)
        if not files:
            raise CallRefusedError(
                grpc.StatusCode.NOT_FOUND, f"run {called} has nothing to download yet"
            )
        try:
            return pb.Manifest(name=called, files=[self._entry(file) for file in files])
        except OSError as error:
            raise _changed(f"{error.filename} ({error.strerror})") from None

    def _entry(self, file: LocalFile) -> pb.ArtifactFile:
        return pb.ArtifactFile(path=file.path, size=file.size, sha256=self._digests.of(file))

    def _find(self, request: pb.DownloadRequest, role: str, name: str) -> LocalFile:
        _, files = self._files(request.of, role, name)
        found = next((file for file in files if file.path == request.path), None)
        if found is None:
            raise _changed(f"{request.path[:200]!r} is not there (any more)")
        if request.offset > found.size:
            raise _changed(f"{request.path[:200]!r} has {found.size} bytes")
        return found

    @contextmanager
    def _counted(self, who: str) -> Iterator[None]:
        if self._open.total() >= _AT_ONCE or self._open[who] >= _AT_ONCE_EACH:
            raise CallRefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many downloads at once; try again later"
            )
        self._open[who] += 1
        try:
            yield
        finally:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]


def _opened(file: LocalFile) -> BinaryIO:
    try:
        return Path(os.path.realpath(file.place)).open("rb")
    except OSError as error:
        raise _changed(f"{file.path} ({error.strerror})") from None


def _piece(stream: BinaryIO, file: LocalFile, offset: int) -> bytes:
    """The next bytes of a file that is still what it was; empty at its end."""
    try:
        stream.seek(offset)
        data = stream.read(CHUNK_BYTES)
        found = os.fstat(stream.fileno())
    except OSError as error:
        raise _changed(f"{file.path} ({error.strerror})") from None
    if (found.st_size, found.st_mtime_ns) != (file.size, file.mtime_ns):
        raise _changed(file.path)
    return data


def _changed(words: str) -> FedtuneError:
    return CallRefusedError(
        grpc.StatusCode.ABORTED, f"a file changed meanwhile: {words}; ask for the manifest again"
    )
