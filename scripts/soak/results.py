"""What a part of the soak found: a JSON line per case as it happens, and a table at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

State: TypeAlias = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        words: why it failed or was skipped; otherwise what there is to say.
        numbers: what was measured, units in the names.
    """

    part: str
    case: str
    state: State
    seconds: float
    words: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


Tell: TypeAlias = Callable[[Result], None]


class Journal:
    """Writes results to a file and to the terminal as they come.

    Args:
        path: is appended to; None: the terminal alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.results: list[Result] = []

    def __call__(self, result: Result) -> None:
        self.results.append(result)
        line = json.dumps(asdict(result) | {"time": round(time.time(), 1)})
        print(line, file=sys.stderr, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    @property
    def failed(self) -> bool:
        return any(result.state == "failed" for result in self.results)


def table(results: Sequence[Result]) -> str:
    """A row per case."""
    head = ("part", "case", "state", "seconds", "words")
    rows = [(r.part, r.case, r.state, f"{r.seconds:.1f}", r.words[:70]) for r in results]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = (
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def failed(part: str, case: str, error: BaseException, seconds: float) -> Result:
    return Result(part, case, "failed", seconds, f"{type(error).__name__}: {error}"[:500])
