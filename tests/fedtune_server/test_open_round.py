"""What an open round was told lies on the disk until the round is saved."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune_server.open_round import OpenRounds

NAMES = ["north", "Süd/2", ".."]


@pytest.fixture
def rounds(tmp_path: Path) -> OpenRounds:
    return OpenRounds(tmp_path / "open")


def test_another_process_finds_what_was_kept(rounds: OpenRounds, tmp_path: Path) -> None:
    for position, name in enumerate(NAMES):
        kept = rounds.keep(7, name, b"body" + bytes([position]), bytes(position))
        assert (kept.body, bytes(kept.tensors)) == (b"body" + bytes([position]), bytes(position))
    found = OpenRounds(tmp_path / "open").kept(7, [*reversed(NAMES), "nobody"])
    assert list(found) == list(reversed(NAMES))
    assert {name: len(kept.tensors) for name, kept in found.items()} == {
        name: position for position, name in enumerate(NAMES)
    }
    assert OpenRounds(tmp_path / "open").kept(8, NAMES) == {}


def test_half_an_answer_is_none(rounds: OpenRounds, tmp_path: Path) -> None:
    """A process that was killed between its two files, or during the first."""
    rounds.keep(7, "north", b"body", b"tensors")
    (body,) = tmp_path.rglob("*.body")
    tensors = body.with_suffix(".tensors")
    content = body.read_bytes()
    body.unlink()
    assert rounds.kept(7, ["north"]) == {}
    body.write_bytes(content)
    tensors.unlink()
    assert OpenRounds(tmp_path / "open").kept(7, ["north"]) == {}


def test_other_rounds_are_forgotten(rounds: OpenRounds) -> None:
    for number in (6, 7, 8):
        rounds.keep(number, "north", b"body", b"tensors")
    rounds.forget_all_but(7)
    assert [len(rounds.kept(number, ["north"])) for number in (6, 7, 8)] == [0, 1, 0]
    rounds.close(7)
    assert rounds.kept(7, ["north"]) == {}
    rounds.keep(9, "north", b"body", b"tensors")
    rounds.forget_all_but(None)
    assert rounds.kept(9, ["north"]) == {}


def test_a_full_disk_is_one_line(rounds: OpenRounds, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fedtune.wire.durable.os.fsync", full)
    with pytest.raises(RunError, match=r"tensors cannot be written \(No space left"):
        rounds.keep(7, "north", b"body", b"tensors")
    assert rounds.kept(7, ["north"]) == {}
