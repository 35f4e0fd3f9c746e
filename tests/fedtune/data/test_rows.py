"""JSONL rows: what is read, and how a broken file or line is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.data.rows import Row, holds_rows, read_rows, required_kinds
from fedtune.errors import DataError
from fedtune.settings import DataSection


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refusal(path: Path, *required: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, required)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_keep_their_line_numbers_over_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": "x"}\r\n\n  \n{"a": "ü\u2028y", "b": 1}')
    rows = read_rows(path, ["a"])
    assert [(row.line, row.values) for row in rows] == [
        (1, {"a": "x"}),
        (4, {"a": "ü\u2028y", "b": 1}),
    ]
    assert rows[1].place == f"{path}:4"


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, b'\xef\xbb\xbf{"a": "x"}'), ["a"])[0].text("a") == "x"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'a': 1}", "rows.jsonl:2: not JSON (Expecting property name"),
        ('{"a": "x"', "rows.jsonl:2: not JSON"),
        ("[1, 2]", "rows.jsonl:2: expected a JSON object, found a list"),
        ("null", "rows.jsonl:2: expected a JSON object, found null"),
        ('"text"', "rows.jsonl:2: expected a JSON object, found 'text'"),
        ('{"b": 1, "c": 2}', "rows.jsonl:2: missing key 'a'; the row's keys: b, c"),
        ("{}", "rows.jsonl:2: missing key 'a'; the row's keys: none"),
        ('{"a": 5}', "rows.jsonl:2: 'a' must be a text, found 5"),
        ('{"a": null}', "rows.jsonl:2: 'a' must be a text, found null"),
        ('{"a": {"x": 1}}', "rows.jsonl:2: 'a' must be a text, found an object"),
        ('{"a": ' + "1" * 5000 + "}", "rows.jsonl:2: a number too long"),
        ("[" * 100_000, "rows.jsonl:2: a number too long, or nested too deeply"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, words: str) -> None:
    assert words in refusal(write(tmp_path, f'{{"a": "fine"}}\n{line}\n'), "a")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "none.jsonl cannot be read (No such file" in refusal(tmp_path / "none.jsonl")
    assert "cannot be read" in refusal(tmp_path)
    assert "holds no rows; expected one JSON object per line" in refusal(write(tmp_path, "\n \n"))
    broken = write(tmp_path, b'{"a": "x"}\n{"a": "\xff"}\n')
    assert "rows.jsonl:2: not UTF-8 text; save the file as UTF-8" in refusal(broken)


def test_labels_are_names() -> None:
    row = Row("f", 3, {"a": True, "b": 7, "c": "x y", "d": 1.5, "e": "", "f": "x\ny"})
    assert [row.label(key) for key in "abc"] == ["true", "7", "x y"]
    with pytest.raises(DataError, match="f:3: 'd' must be a text, an integer or true/false"):
        row.label("d")
    for key in "ef":
        with pytest.raises(DataError, match=f"f:3: '{key}' must be a name on one line"):
            row.label(key)


def test_messages_are_lists_of_turns() -> None:
    turns = [{"role": "user", "content": "hi", "extra": 1}]
    row = Row("f", 1, {"good": turns, "none": [], "bad": [{"role": "user"}], "text": "x"})
    assert row.messages("good") == [{"role": "user", "content": "hi"}]
    for key in ("none", "bad", "text"):
        with pytest.raises(DataError, match=f"f:1: '{key}' must be a list of objects"):
            row.messages(key)


def test_what_a_format_requires_follows_the_keys_of_the_run() -> None:
    data = DataSection(train="t", format="text-label", text_field="body", label_field="class")
    assert required_kinds(data) == {"body": "text", "class": "label"}
    assert required_kinds(DataSection(train="t")) == {"prompt": "text", "response": "text"}


def test_whether_a_file_holds_rows_is_told_without_parsing_it(tmp_path: Path) -> None:
    assert holds_rows(write(tmp_path, "\n\nnot json"))
    assert not holds_rows(write(tmp_path, "\n \r\n"))
    assert not holds_rows(write(tmp_path, b"\xef\xbb\xbf"))
    with pytest.raises(DataError, match="cannot be read"):
        holds_rows(tmp_path / "none.jsonl")
