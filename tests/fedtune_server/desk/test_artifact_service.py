"""ArtifactService on loopback: who gets which files, and what is never given."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.deploy.download import download
from fedtune.deploy.manifest import CHUNK_BYTES
from fedtune.errors import DeploymentError
from fedtune.model.source import base_digest
from fedtune.v1 import coordinator_pb2 as pb
from fedtune.v1.coordinator_pb2_grpc import ArtifactServiceStub, RunServiceStub
from fedtune_server.desk.queue import Queue, Wanted
from tests.fedtune_server.desk.office import Office, config, opened_office

BIG = bytes(range(256)) * (CHUNK_BYTES // 256) + b"tail"
RUN = pb.ManifestRequest(run="demo")


def make_base(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.pdf").write_text("not a part of it")
    return base_digest(folder)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return make_base(tmp_path / "base")


@pytest.fixture
def office(tmp_path: Path, base: str) -> Iterator[Office]:
    with opened_office(tmp_path / "home", bases=(str(tmp_path / "base"),)) as found:
        text = config().model_dump_json()
        ended = Wanted("demo", text, "2026-01-01", wanted="stopped", ended="stopped")
        Queue(found.parts.home.queue).put(ended)
        folder = found.folder("demo")
        for path, data in {
            "config.json": b"{}",
            "checkpoints/round-0001.safetensors": b"old",
            "checkpoints/round-0002.safetensors": BIG,
            "exports/peft/adapter_model.safetensors": b"adapter",
            "ledger.jsonl": b"not for sites",
            "devices/north/state": b"nor is this",
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        yield found


def paths(channel: Any, of: pb.ManifestRequest) -> list[str]:
    manifest = ArtifactServiceStub(channel).GetManifest(of, timeout=10)
    return sorted(file.path for file in manifest.files)


def test_a_site_downloads_a_run_in_which_it_takes_part(office: Office, tmp_path: Path) -> None:
    with office.channel("token-of-north") as channel:
        download(channel, RUN, tmp_path / "here")
    found = sorted(
        path.relative_to(tmp_path / "here").as_posix()
        for path in (tmp_path / "here").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    assert found == [
        "checkpoints/round-0002.safetensors",
        "config.json",
        "exports/peft/adapter_model.safetensors",
    ]
    assert (tmp_path / "here/checkpoints/round-0002.safetensors").read_bytes() == BIG


def test_a_base_is_found_by_its_digest(office: Office, base: str) -> None:
    with office.channel("token-of-south") as channel:
        found = paths(channel, pb.ManifestRequest(base_digest=base))
        assert found == ["config.json", "model.safetensors", "tokenizer.json"]
        with pytest.raises(grpc.RpcError, match="no base model with digest"):
            paths(channel, pb.ManifestRequest(base_digest="0" * 64))
        for wrong in (pb.ManifestRequest(), pb.ManifestRequest(base_digest="../base")):
            with pytest.raises(grpc.RpcError, match="expected the name of a run"):
                paths(channel, wrong)


def test_other_runs_are_not_there_for_a_site(office: Office, tmp_path: Path) -> None:
    office.registry.add("east")
    with office.channel("token-of-east") as channel:
        with pytest.raises(DeploymentError, match="no run is called 'demo' here"):
            download(channel, RUN, tmp_path / "here")
        request = pb.DownloadRequest(of=RUN, path="config.json")
        with pytest.raises(grpc.RpcError, match="no run is called"):
            list(ArtifactServiceStub(channel).Download(request, timeout=5))


@pytest.mark.parametrize(
    "path",
    ["ledger.jsonl", "../../operator.toml", "/etc/passwd", "checkpoints/../ledger.jsonl", "", "."],
)
def test_nothing_but_what_the_manifest_lists(office: Office, path: str) -> None:
    with office.channel("token-of-north") as channel:
        request = pb.DownloadRequest(of=RUN, path=path)
        with pytest.raises(grpc.RpcError) as caught:
            list(ArtifactServiceStub(channel).Download(request, timeout=5))
    assert caught.value.code() == grpc.StatusCode.ABORTED


def test_links_are_not_followed(office: Office) -> None:
    exports = office.folder("demo") / "exports"
    (exports / "link.safetensors").symlink_to(office.parts.home.operator_file)
    (exports / "folder").symlink_to(office.parts.home.path)
    with office.channel("token-of-north") as channel:
        found = paths(channel, RUN)
        assert not any("link" in path or "folder" in path for path in found)
        request = pb.DownloadRequest(of=RUN, path="exports/link.safetensors")
        with pytest.raises(grpc.RpcError, match="is not there"):
            list(ArtifactServiceStub(channel).Download(request, timeout=5))


def test_a_base_in_the_hubs_cache_is_read_through_its_links(tmp_path: Path, base: str) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "base").iterdir():
        (blobs / f"{file.name}-blob").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    (snapshot / "passwd.txt").symlink_to("/etc/passwd")
    with (
        opened_office(tmp_path / "other", bases=(str(snapshot),)) as office,
        office.channel() as channel,
    ):
        found = paths(channel, pb.ManifestRequest(base_digest=base))
        assert found == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_file_that_changes_while_it_is_sent_breaks_the_stream(office: Office) -> None:
    path = "checkpoints/round-0002.safetensors"
    with office.channel("token-of-north") as channel:
        paths(channel, RUN)
        (office.folder("demo") / path).write_bytes(b"x" * (40 * CHUNK_BYTES))
        stream = ArtifactServiceStub(channel).Download(
            pb.DownloadRequest(of=RUN, path=path), timeout=20
        )
        next(stream)
        (office.folder("demo") / path).write_bytes(b"short")
        with pytest.raises(grpc.RpcError, match="a file changed meanwhile"):
            list(stream)


def test_a_site_that_is_revoked_gets_no_more_of_a_file(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune_server.desk.artifact_service._LOOK_S", 0.0)
    path = "checkpoints/round-0002.safetensors"
    (office.folder("demo") / path).write_bytes(b"x" * (40 * CHUNK_BYTES))
    with office.channel("token-of-north") as channel:
        stream = ArtifactServiceStub(channel).Download(
            pb.DownloadRequest(of=RUN, path=path), timeout=20
        )
        next(stream)
        office.registry.known["north"].state = "revoked"
        with pytest.raises(grpc.RpcError, match="site north is revoked"):
            list(stream)


def test_who_waits_for_digests_keeps_nobody_else_waiting(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many manifests of a base of 100 GB as there may be calls, and `fedtune ps` answers."""
    hold = threading.Event()
    monkeypatch.setattr(
        "fedtune_server.desk.artifacts.Bases.find", lambda self, digest: hold.wait(20)
    )
    try:
        with office.channel("token-of-north") as north, office.channel() as operator:
            ask = ArtifactServiceStub(north).GetManifest
            calls = [ask.future(pb.ManifestRequest(base_digest="a" * 64)) for _ in range(40)]
            time.sleep(0.2)
            RunServiceStub(operator).ListRuns(pb.ListRunsRequest(), timeout=5)
            for call in calls:
                call.cancel()
    finally:
        hold.set()


def test_a_caller_has_few_streams_at_once(office: Office) -> None:
    path = "checkpoints/round-0002.safetensors"
    (office.folder("demo") / path).write_bytes(b"x" * (64 * CHUNK_BYTES))
    with office.channel("token-of-north") as channel:
        stub = ArtifactServiceStub(channel)
        streams = [stub.Download(pb.DownloadRequest(of=RUN, path=path)) for _ in range(4)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError, match="too many downloads at once"):
            next(stub.Download(pb.DownloadRequest(of=RUN, path=path)))
        for stream in streams:
            stream.cancel()


def test_downloads_share_a_bandwidth(tmp_path: Path, base: str) -> None:
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * (3 * CHUNK_BYTES))
    digest = base_digest(tmp_path / "base")
    limits = {"download_bytes_per_s": 2 * CHUNK_BYTES}
    with (
        opened_office(tmp_path / "h", bases=(str(tmp_path / "base"),), limits=limits) as office,
        office.channel() as channel,
    ):
        started = time.monotonic()
        download(channel, pb.ManifestRequest(base_digest=digest), tmp_path / "here")
        seconds = time.monotonic() - started
    # 3 MiB at 2 MiB a second, of which half a MiB may come at once.
    assert seconds > 1.1
