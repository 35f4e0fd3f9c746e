"""Manifests are words from the network: what could leave the folder or be two files is refused."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.deploy.manifest import check_path, read_manifest
from fedtune.errors import ProtocolError
from fedtune.v1 import coordinator_pb2 as pb

GOOD = "a" * 64


def manifest(*paths: str, size: int = 1, sha256: str = GOOD) -> pb.Manifest:
    files = [pb.ArtifactFile(path=path, size=size, sha256=sha256) for path in paths]
    return pb.Manifest(name="x", files=files)


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "./a", "a/./b", "C:/x", "C:x",
        "a\\b", "\\\\host\\share", "con", "CON.txt", "a/nul", "com1.json", "x.", "x ", " x", "a\nb",
        "a\x00b", "a\x1b[2J", "stream:alt", "a*b", "a?b", "x.partial", "x" * 201,
        "a\u202eb", "é" * 150, "/".join("a" * 20),
    ],
)  # fmt: skip
def test_paths_that_are_something_else_somewhere_are_refused(path: str) -> None:
    with pytest.raises(ProtocolError, match="manifest of the coordinator"):
        read_manifest(manifest(path))


@pytest.mark.parametrize(
    "path", ["config.json", "exports/merged/model-00001-of-00002.safetensors", "ä/ö.json", "a b.c"]
)
def test_plain_paths_pass(path: str) -> None:
    assert read_manifest(manifest(path))[0].path == path


@given(st.text(st.sampled_from("ab./\\:~ \x00CON"), max_size=12))
def test_whatever_passes_stays_below_the_folder_on_every_system(path: str) -> None:
    try:
        check_path(path)
    except ProtocolError:
        return
    for kind in (PurePosixPath, PureWindowsPath):
        found = kind("top") / kind(path)
        assert found.parts[0] == "top"
        assert ".." not in found.parts
        assert len(found.parts) == len(path.split("/")) + 1


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (manifest(), "expected 1 to 10000 files, found 0"),
        (manifest("a", "A"), "there twice"),
        (manifest("a/b", "a"), "is a file and a folder"),
        (manifest("a", size=1 << 63), "found 9223372036854775808"),
        (manifest(*(f"f{n}" for n in range(20)), size=1 << 43), "bytes in all"),
        (manifest("a", sha256="zz"), "expected a sha256 in hex"),
        (manifest("a", sha256=GOOD.upper()), "expected a sha256 in hex"),
        (manifest(*(f"f{n}" for n in range(10_001))), "found 10001"),
    ],
)
def test_impossible_manifests_are_refused(found: pb.Manifest, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        read_manifest(found)
