"""A site's base models, by digest."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from fedtune.errors import DeploymentError, ModelError
from fedtune.model.source import base_digest
from fedtune_client.bases import Bases, Progress


def refused(bases: Bases, digest: str, wait_s: float = 0.0) -> str:
    with pytest.raises(ModelError) as caught:
        bases.folder(digest, wait_s)
    return str(caught.value)


def test_a_base_is_found_by_its_digest_alone(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    bases = Bases([tmp_path / "none", tiny_bert, tiny_llama], tmp_path / "kept", None)
    assert bases.folder(base_digest(tiny_llama)) == tiny_llama
    assert bases.folder(base_digest(tiny_bert)) == tiny_bert
    assert "base 000000000000 is not on this site" in refused(bases, "0" * 64)


def test_a_folder_of_bases_is_searched(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "models" / "llama")
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "config.json").write_text("{}")
    bases = Bases([tmp_path / "models"], tmp_path / "kept", None)
    assert bases.folder(base_digest(tiny_llama)) == tmp_path / "models" / "llama"


def test_a_base_that_changes_is_that_base_no_more(tiny_llama: Path, tmp_path: Path) -> None:
    copy, digest = tmp_path / "llama", base_digest(tiny_llama)
    shutil.copytree(tiny_llama, copy)
    bases = Bases([copy], tmp_path / "kept", None)
    assert bases.folder(digest) == copy
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "is not on this site" in refused(bases, digest)


class Source:
    """Gives a base when it is let; counts how often it was asked."""

    def __init__(self, base: Path) -> None:
        self.base, self.go, self.asked = base, threading.Event(), 0
        self.error: Exception | None = None

    def __call__(self, digest: str, target: Path, progress: Progress) -> None:
        self.asked += 1
        progress(1, 4)
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        shutil.copytree(self.base, target, dirs_exist_ok=True)
        progress(4, 4)


@pytest.fixture
def source(tiny_llama: Path) -> Source:
    return Source(tiny_llama)


def test_a_download_goes_on_while_the_site_says_how_far_it_is(
    source: Source, tiny_llama: Path, tmp_path: Path
) -> None:
    digest = base_digest(tiny_llama)
    bases = Bases([], tmp_path / "kept", source)
    for _ in range(2):
        words = refused(bases, digest, 0.05)
        assert f"base {digest[:12]} is being downloaded (25 %)" in words
    assert bases.downloading
    source.go.set()
    assert bases.folder(digest, 20) == tmp_path / "kept" / digest
    assert not bases.downloading
    assert source.asked == 1
    # Another process finds it without asking.
    assert Bases([], tmp_path / "kept", None).folder(digest) == tmp_path / "kept" / digest


def test_what_is_not_the_base_is_thrown_away(
    source: Source, tiny_bert: Path, tmp_path: Path
) -> None:
    source.base = tiny_bert
    source.go.set()
    bases = Bases([], tmp_path / "kept", source)
    assert "what the coordinator gave has the digest" in refused(bases, "1" * 64, 20)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_download_that_failed_is_begun_again_with_what_is_there(
    source: Source, tiny_llama: Path, tmp_path: Path
) -> None:
    digest = base_digest(tiny_llama)
    source.error = DeploymentError("the coordinator does not answer")
    source.go.set()
    bases = Bases([], tmp_path / "kept", source)
    assert "cannot be downloaded: the coordinator does not answer" in refused(bases, digest, 20)
    (tmp_path / "kept" / f"{digest}.incomplete" / "part").write_text("kept")
    source.error = None
    found = bases.folder(digest, 20)
    assert (found / "part").exists()
    assert source.asked == 2


def test_a_search_does_not_wait_for_a_download_that_is_not_asked(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert "is not on this site" in refused(Bases([], tmp_path, None), "2" * 64, 20)
    assert time.monotonic() - begun < 5
