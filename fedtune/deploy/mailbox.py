"""Hands messages from a site to the run that answers for it, on the same machine, by files.

    ask.json     the newest question: its id, its kind, and what the site says of itself
    answer.json  the id that it answers, and why there is no answer, or nothing
    ID.body ID.tensors  ID.answer-body ID.answer-tensors
    alive        touched while somebody answers

A group's site asks here, and the ServerApp of the level below answers (docs/hierarchy.md). There is
one question at a time. A file is renamed into place once it is whole, and `ask.json` and
`answer.json` come last, so either side may be killed at any moment: a question that is still there
is answered by whoever comes next, and one that nobody waits for is gone.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune.deploy.files import make_private_folder, write_private
from fedtune.errors import ProtocolError
from fedtune.wire.fields import MAX_MESSAGE_BYTES

MOST_TENSORS = 8 << 30
"""Bytes of tensors of one message; an adapter of 7B shapes has 1.3 GB at rank 128 in fp32."""
_MOST_HEADER = 200_000
_ID = re.compile(r"[0-9a-f]{32}")
_MOST_REASON = 2000


@dataclass(frozen=True, slots=True)
class Ask:
    """A question.

    Attributes:
        id: 32 hexadecimal digits, drawn for it.
        kind: of the message, such as `train.lora`.
        about: what the site says beside the message, plain values.
        tensors: packed; None: none came with it.
    """

    id: str
    kind: str
    about: Mapping[str, object]
    body: bytes
    tensors: bytes | None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Attributes:
        failure: why there is none; empty otherwise.
    """

    failure: str = ""
    body: bytes = b""
    tensors: bytes | None = None


class Mailbox:
    """The folder between the two processes, which both own.

    Args:
        folder: made, for its owner alone, where it is not there.

    Raises (all methods that write):
        RunError: the disk is full or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_private_folder(folder)

    # ------------------------------------------------------------ who asks

    def ask(
        self, kind: str, about: Mapping[str, object], body: bytes, tensors: bytes | None
    ) -> str:
        """Put a question in place of the one before; returns its id."""
        number = os.urandom(16).hex()
        self._put(f"{number}.body", body)
        if tensors is not None:
            self._put(f"{number}.tensors", tensors)
        header = {"id": number, "kind": kind, "about": dict(about), "packed": tensors is not None}
        self._put("ask.json", json.dumps(header).encode("utf-8"))
        self._remove("answer.json", "*.*", but=number)
        return number

    def answer_to(self, number: str) -> Answer | None:
        """The answer to a question; None: there is none yet.

        Raises:
            ProtocolError: what is there is no answer.
        """
        header = self._header("answer.json")
        if header is None or header.get("id") != number:
            return None
        failure = header.get("failure")
        if not isinstance(failure, str):
            raise ProtocolError(f"{self.folder}: expected an answer's reason, found none")
        if failure:
            return Answer(failure[:_MOST_REASON])
        body = self._read(f"{number}.answer-body", MAX_MESSAGE_BYTES)
        packed = header.get("packed") is True
        return Answer(
            "", body, self._read(f"{number}.answer-tensors", MOST_TENSORS) if packed else None
        )

    def clear(self) -> None:
        """Take the question back, and remove all that was said about it."""
        self._remove("ask.json", "answer.json", "*.*")

    def silent_s(self) -> float | None:
        """Seconds since somebody who answers was last there; None: nobody ever was."""
        try:
            return max(0.0, time.time() - (self.folder / "alive").stat().st_mtime)
        except OSError:
            return None

    # ------------------------------------------------------------ who answers

    def alive(self) -> None:
        """Say that somebody answers."""
        with suppress(OSError):
            (self.folder / "alive").touch()

    def asked(self) -> str | None:
        """Id of the question that waits; None: there is none.

        Raises:
            ProtocolError: what is there is no question.
        """
        header = self._header("ask.json")
        if header is None:
            return None
        number = header.get("id")
        if not isinstance(number, str) or not _ID.fullmatch(number):
            raise ProtocolError(f"{self.folder / 'ask.json'}: expected an id, found none")
        return number

    def take(self) -> Ask | None:
        """The question that waits, which stays until it is taken back; None: there is none.

        Raises:
            ProtocolError: what is there is no question.
        """
        number, header = self.asked(), self._header("ask.json")
        if number is None or header is None or header.get("id") != number:
            return None
        kind, about = header.get("kind"), header.get("about")
        if not isinstance(kind, str) or not isinstance(about, dict):
            raise ProtocolError(f"{self.folder / 'ask.json'}: expected a kind, found none")
        try:
            body = self._read(f"{number}.body", MAX_MESSAGE_BYTES)
            packed = header.get("packed") is True
            tensors = self._read(f"{number}.tensors", MOST_TENSORS) if packed else None
        except FileNotFoundError:
            return None  # taken back meanwhile
        return Ask(number, kind, about, body, tensors)

    def answer(self, number: str, answer: Answer) -> None:
        """Answer a question; one that was taken back is answered to nobody."""
        self._put(f"{number}.answer-body", answer.body)
        if answer.tensors is not None:
            self._put(f"{number}.answer-tensors", answer.tensors)
        packed = answer.tensors is not None
        header = {"id": number, "failure": answer.failure[:_MOST_REASON], "packed": packed}
        self._put("answer.json", json.dumps(header).encode("utf-8"))

    # ------------------------------------------------------------ files

    def _remove(self, *patterns: str, but: str = "") -> None:
        """Remove headers as named, and what belongs to any question but one."""
        for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
            number = path.name.partition(".")[0]
            if path.name in patterns or (_ID.fullmatch(number) and number != but):
                with suppress(OSError):  # Windows, while the other side reads it
                    path.unlink()

    def _put(self, name: str, content: bytes) -> None:
        write_private(self.folder / name, content)

    def _header(self, name: str) -> Mapping[str, object] | None:
        try:
            tree = json.loads(self._read(name, _MOST_HEADER))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            raise ProtocolError(f"{self.folder / name} is not a message's; remove it")
        return tree

    def _read(self, name: str, most: int) -> bytes:
        """A file, of a bounded size; FileNotFoundError where it is not there."""
        with (self.folder / name).open("rb") as file:
            if os.fstat(file.fileno()).st_size > most:
                raise ProtocolError(f"{self.folder / name}: expected at most {most} bytes")
            return file.read()
