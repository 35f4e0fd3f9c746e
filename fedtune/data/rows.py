"""Rows of a JSONL file, each knowing where it stands so that a refusal can point at it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedtune.errors import DataError
from fedtune.settings import DataSection

Kind = Literal["text", "label", "messages"]
"""What a key holds: a text; a class or group (text, integer or boolean); a list of turns."""

_EXPECTED: Final[Mapping[Kind, str]] = {
    "text": "a text",
    "label": "a text, an integer or true/false",
    "messages": "a list of objects with the texts role and content",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSONL file.

    Attributes:
        source: the file, as it is called in errors.
        line: from 1.
        values: the JSON object.
    """

    source: str
    line: int
    values: Mapping[str, object]

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"

    def text(self, key: str) -> str:
        """The text under a key.

        Raises:
            DataError: the key is missing or holds something else.
        """
        self._check(key, "text")
        return str(self.values[key])

    def label(self, key: str) -> str:
        """The class or group under a key, as a name: `true` and `1` become texts.

        Raises:
            DataError: the key is missing, empty, or neither text, integer nor boolean.
        """
        self._check(key, "label")
        value = self.values[key]
        return str(value).lower() if isinstance(value, bool) else str(value)

    def messages(self, key: str) -> list[dict[str, str]]:
        """The turns of a conversation under a key, each with `role` and `content`.

        Raises:
            DataError: the key is missing or a turn is not of that form.
        """
        self._check(key, "messages")
        turns = self.values[key]
        assert isinstance(turns, list)
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]

    def _check(self, key: str, kind: Kind) -> None:
        if key not in self.values:
            found = ", ".join(str(name) for name in self.values) or "none"
            raise DataError(f"{self.place}: missing key {key!r}; the row's keys: {found}")
        value = self.values[key]
        if not _is_kind(value, kind):
            raise DataError(
                f"{self.place}: {key!r} must be {_EXPECTED[kind]}, found {_describe(value)}"
            )
        if kind == "label" and isinstance(value, str) and not (value and value.isprintable()):
            raise DataError(f"{self.place}: {key!r} must be a name on one line, found {value!r}")


def read_rows(path: Path, required: Sequence[str] | Mapping[str, Kind] = ()) -> list[Row]:
    """Read a JSONL file: one JSON object per line, UTF-8, blank lines skipped.

    Args:
        path: the file.
        required: keys that every row must hold, with their kinds; plain keys hold texts.

    Raises:
        DataError: the file cannot be read, is empty or not UTF-8, or a line is not a JSON object
            with the required keys; the message names file and line.
    """
    kinds: Mapping[str, Kind] = (
        required if isinstance(required, Mapping) else dict.fromkeys(required, "text")
    )
    rows = [
        _parse(str(path), number, line, kinds)
        for number, line in enumerate(_read_text(path).split("\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object per line")
    return rows


def holds_rows(path: Path) -> bool:
    """Whether a file has a line that is not blank; reads no further than that line.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return any(line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror})") from None


def required_kinds(data: DataSection) -> dict[str, Kind]:
    """The keys that every row of a run's data must hold, and their kinds."""
    by_format: Mapping[str, dict[str, Kind]] = {
        "prompt-response": {data.prompt_field: "text", data.response_field: "text"},
        "text": {data.text_field: "text"},
        "messages": {data.messages_field: "messages"},
        "text-label": {data.text_field: "text", data.label_field: "label"},
    }
    return by_format[data.format]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _parse(source: str, number: int, line: str, kinds: Mapping[str, Kind]) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}:{number}: not JSON ({error.msg} at column {error.colno}); expected one "
            "JSON object per line"
        ) from None
    except (ValueError, RecursionError):
        # Python's own limits: an integer of thousands of digits, or thousands of brackets.
        raise DataError(f"{source}:{number}: a number too long, or nested too deeply") from None
    if not isinstance(values, dict):
        raise DataError(f"{source}:{number}: expected a JSON object, found {_describe(values)}")
    row = Row(source, number, values)
    for key, kind in kinds.items():
        row._check(key, kind)
    return row


def _is_kind(value: object, kind: Kind) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "label":
        return isinstance(value, str | int)
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def _describe(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
