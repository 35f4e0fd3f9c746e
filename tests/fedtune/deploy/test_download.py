"""Downloads that are cut at any byte go on, from a real server on loopback that cuts them."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.deploy import download as module
from fedtune.deploy.channel import open_channel
from fedtune.deploy.download import download
from fedtune.deploy.manifest import CHUNK_BYTES
from fedtune.errors import DeploymentError, ProtocolError, RunError
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import (
    ArtifactServiceServicer,
    add_ArtifactServiceServicer_to_server,
)

RUN = pb.ManifestRequest(run="demo")
BIG = random.Random(1).randbytes(3 * CHUNK_BYTES + 17)
FILES = {"config.json": b"{}", "exports/peft/adapter.safetensors": BIG, "empty.txt": b""}


class Server(ArtifactServiceServicer):
    """Serves files from memory and misbehaves as told.

    Attributes:
        cuts: bytes after which each next stream breaks; then they run through.
        served: bytes of data sent.
        spoil: changes a chunk before it is sent.
    """

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.cuts: list[int] = []
        self.served = 0
        self.spoil: Callable[[pb.Chunk], pb.Chunk] = lambda chunk: chunk
        self.listed: Callable[[pb.Manifest], pb.Manifest] = lambda manifest: manifest
        self.manifests = 0

    def GetManifest(self, request: pb.ManifestRequest, context: Any) -> pb.Manifest:
        self.manifests += 1
        if request.run != "demo":
            context.abort(grpc.StatusCode.NOT_FOUND, "no run is called so here")
        files = [
            pb.ArtifactFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in self.files.items()
        ]
        return self.listed(pb.Manifest(name="demo", files=files))

    def Download(self, request: pb.DownloadRequest, context: Any) -> Iterator[pb.Chunk]:
        data, offset = self.files[request.path], request.offset
        left = self.cuts.pop(0) if self.cuts and data else None
        while offset < len(data):
            piece = data[offset : offset + CHUNK_BYTES]
            if left is not None and left < len(piece):
                context.abort(grpc.StatusCode.UNAVAILABLE, "the link was cut")
            left = None if left is None else left - len(piece)
            digest = hashlib.sha256(piece).digest()
            yield self.spoil(pb.Chunk(offset=offset, data=piece, sha256=digest))
            self.served += len(piece)
            offset += len(piece)


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[Server, Any]]:
    served = Server()
    server = grpc.server(ThreadPoolExecutor(4))
    add_ArtifactServiceServicer_to_server(served, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = open_channel(f"127.0.0.1:{port}", b"", "t", insecure=True)
    yield served, channel
    channel.close()
    server.stop(0).wait()


@pytest.fixture
def served(started: tuple[Server, Any]) -> Server:
    started[0].__init__()  # type: ignore[misc]  # as new
    return started[0]


@pytest.fixture
def channel(started: tuple[Server, Any]) -> Any:
    return started[1]


def fetch(channel: Any, target: Path, **options: Any) -> None:
    download(channel, RUN, target, sleep=lambda seconds: None, **options)


def check(target: Path, files: dict[str, bytes] = FILES) -> None:
    found = {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file() and path.name != ".download.lock"
    }
    assert found == files


def test_all_files_come_and_none_comes_twice(served: Server, channel: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    fetch(channel, tmp_path, progress=lambda here, total: told.append((here, total)))
    check(tmp_path)
    assert told[-1] == (len(BIG) + 2, len(BIG) + 2)
    assert told == sorted(told)
    before = served.served
    fetch(channel, tmp_path)
    assert served.served == before


CUTS = st.one_of(
    st.sampled_from([0, 1, *(n * CHUNK_BYTES + d for n in (1, 2, 3) for d in (-1, 0, 1))]),
    st.integers(0, len(BIG)),
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(CUTS, max_size=6))
def test_a_link_that_breaks_again_and_again_costs_no_file(
    served: Server, channel: Any, cuts: list[int]
) -> None:
    served.served, served.cuts = 0, list(cuts)
    with tempfile.TemporaryDirectory() as folder:
        fetch(channel, Path(folder))
        check(Path(folder))
    assert served.served == len(BIG) + 2  # a stream goes on at the byte where it was cut


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(have=CUTS, torn=st.booleans())
def test_a_process_that_was_killed_at_any_byte_goes_on_there(
    served: Server, channel: Any, have: int, torn: bool
) -> None:
    served.served = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "exports/peft"
        place.mkdir(parents=True)
        digest = hashlib.sha256(BIG).hexdigest()
        left = bytearray(BIG[:have])
        if torn and left:
            left[-1] ^= 0xFF  # what a crash may leave in the last block
        (place / f".adapter.safetensors.{digest[:16]}.partial").write_bytes(left)
        fetch(channel, Path(folder))
        check(Path(folder))
    assert served.served <= len(BIG) - have + CHUNK_BYTES + 2


def test_a_partial_file_that_was_damaged_in_its_middle_is_fetched_anew(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    digest = hashlib.sha256(BIG).hexdigest()
    place = tmp_path / "exports/peft"
    place.mkdir(parents=True)
    partial = place / f".adapter.safetensors.{digest[:16]}.partial"
    partial.write_bytes(b"\0" * (2 * CHUNK_BYTES))
    fetch(channel, tmp_path)
    check(tmp_path)


def test_a_file_that_changed_replaces_what_was_here_of_it(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    fetch(channel, tmp_path)
    (tmp_path / ".config.json.0123456789abcdef.partial").write_bytes(b"of before")
    served.files["config.json"] = b'{"new": 1}'
    fetch(channel, tmp_path)
    check(tmp_path, FILES | {"config.json": b'{"new": 1}'})


def test_a_file_that_changes_meanwhile_is_asked_for_anew(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    def once(chunk: pb.Chunk) -> pb.Chunk:
        served.spoil = lambda chunk: chunk
        return pb.Chunk(offset=chunk.offset, data=chunk.data[:-1] + b"!", sha256=chunk.sha256)

    served.spoil = once
    fetch(channel, tmp_path)
    check(tmp_path)
    assert served.manifests == 2


SPOILED: list[Callable[[pb.Chunk], pb.Chunk]] = [
    lambda chunk: pb.Chunk(offset=chunk.offset, data=chunk.data),
    lambda chunk: pb.Chunk(offset=chunk.offset + 1, data=chunk.data, sha256=chunk.sha256),
    lambda chunk: pb.Chunk(
        offset=chunk.offset,
        data=chunk.data + b"x" * 3,
        sha256=hashlib.sha256(chunk.data + b"x" * 3).digest(),
    ),
    lambda chunk: pb.Chunk(offset=chunk.offset, sha256=hashlib.sha256(b"").digest()),
    lambda chunk: pb.Chunk(
        offset=chunk.offset,
        data=bytes(len(chunk.data)),
        sha256=hashlib.sha256(bytes(len(chunk.data))).digest(),
    ),
]


@pytest.mark.parametrize("number", range(len(SPOILED)))
def test_a_server_that_lies_is_left_and_nothing_wrong_gets_a_name(
    served: Server, channel: Any, tmp_path: Path, number: int
) -> None:
    served.spoil = SPOILED[number]
    with pytest.raises(ProtocolError):
        fetch(channel, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("path", ["../outside", "/tmp/outside", "C:\\outside", "a/../../outside"])
def test_a_hostile_manifest_writes_nothing(
    served: Server, channel: Any, tmp_path: Path, path: str
) -> None:
    served.listed = lambda manifest: pb.Manifest(
        files=[pb.ArtifactFile(path=path, size=2, sha256="a" * 64)]
    )
    target = tmp_path / "in" / "here"
    with pytest.raises(ProtocolError, match="nothing is downloaded"):
        fetch(channel, target)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".download.lock"]


def test_a_link_out_of_the_folder_is_not_followed(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "exports").symlink_to(tmp_path / "outside")
    with pytest.raises(DeploymentError, match="is a link or a folder"):
        fetch(channel, tmp_path / "target")
    assert list((tmp_path / "outside").rglob("*.safetensors")) == []


def test_a_coordinator_that_does_not_come_back_is_left_after_eight_tries(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    served.cuts = [0] * 50
    with pytest.raises(DeploymentError, match=r"does not answer \(the link was cut\)"):
        fetch(channel, tmp_path)
    assert len(served.cuts) == 42


def test_what_is_not_there_is_said_at_once(served: Server, channel: Any, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no run is called so here"):
        download(channel, pb.ManifestRequest(run="other"), tmp_path)
    assert served.manifests == 1


def test_a_disk_that_is_too_small_is_said_before_anything_comes(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    served.listed = lambda manifest: pb.Manifest(
        files=[pb.ArtifactFile(path="huge", size=1 << 43, sha256="a" * 64)]
    )
    with pytest.raises(RunError, match=r"needs \d+ bytes more, the disk has .* free some space"):
        fetch(channel, tmp_path)
    assert served.served == 0


def test_a_disk_that_fills_up_is_said_and_what_came_is_kept(
    served: Server, channel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, chunk: Any, here: int) -> None:
        if here:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_check_chunk", full)
    with pytest.raises(RunError, match="No space left on device"):
        fetch(channel, tmp_path)
    monkeypatch.undo()
    fetch(channel, tmp_path)
    check(tmp_path)


def test_two_processes_do_not_write_to_one_folder(
    served: Server, channel: Any, tmp_path: Path
) -> None:
    def again(here: int, total: int) -> None:
        with pytest.raises(DeploymentError, match="another process downloads"):
            fetch(channel, tmp_path)

    fetch(channel, tmp_path, progress=again)
