"""The chain of a ledger that may be growing; that of a whole one is tested with its writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import RunError
from fedtune.wire.ledger_chain import FIRST, line_hash, sealed, verify_ledger, verify_whole_lines


def _chain(count: int) -> list[bytes]:
    lines: list[bytes] = []
    for seq in range(count):
        prev = line_hash(lines[-1]) if lines else FIRST
        lines.append(sealed({"seq": seq, "kind": "warning", "text": "x\u2028y", "prev": prev}))
    return lines


def test_a_chain_can_be_made_and_checked_without_a_coordinator(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in _chain(3)))
    assert [entry["seq"] for entry in verify_ledger(path)] == [0, 1, 2]
    assert verify_whole_lines(path) == (verify_ledger(path), False)


def test_half_a_line_at_the_end_is_told_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"\n".join(_chain(3)))
    entries, torn = verify_whole_lines(path)
    assert ([entry["seq"] for entry in entries], torn) == ([0, 1], True)
    with pytest.raises(RunError, match="line 3: expected a line break at its end"):
        verify_ledger(path)


def test_a_whole_line_that_is_changed_is_an_error_there_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = _chain(3)
    path.write_bytes(b"\n".join([lines[0], lines[1].replace(b"warning", b"warming"), lines[2]]))
    with pytest.raises(RunError, match="line 2: hash is not that of the line"):
        verify_whole_lines(path)
