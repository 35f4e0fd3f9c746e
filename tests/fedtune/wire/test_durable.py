"""A file is replaced whole, and a disk that does not take it is one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedtune.errors import RunError
from fedtune.wire import durable
from fedtune.wire.durable import write_durably, writing


def test_content_is_on_the_disk_before_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    def flushed(descriptor: int) -> None:
        done.append("flush")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "replace", renamed)
    monkeypatch.setattr(durable.os, "fsync", flushed)
    write_durably(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert done == ["flush", "rename", *(["flush"] if os.name != "nt" else [])]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"No space left on device\); free some space on its disk"),
        (errno.EROFS, r"Read-only file system\); its disk is read-only"),
        (errno.EACCES, r"Permission denied\); give this user the right"),
        (errno.EIO, r"\); check its disk"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the words of errors are others")
def test_a_failed_write_names_its_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "a"
    write_durably(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.os, "fsync", fail)
    with pytest.raises(RunError, match=rf"/a cannot be written \(.*{words}.*give the same command"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_safetensors_file_on_a_full_disk_is_the_same_line(tmp_path: Path) -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(RunError, match=r"a cannot be written \(No space left on device\); free"),
        writing(tmp_path / "a"),
    ):
        raise SafetensorError(text)
    with pytest.raises(SafetensorError, match="header"), writing(tmp_path / "a"):
        raise SafetensorError("Error while deserializing header")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")
